/** A place for files: a label around an input, onto which files can be dropped as well. */
export class Chooser {
  #label;
  #input;
  #name;
  #preview;
  #invitation;

  /**
   * @param {HTMLInputElement} input within a label that has a span for the file's name, and may have an img for its preview
   * @param {(files: File[]) => void} chosen called when the files have changed
   */
  constructor(input, chosen) {
    const label = input.closest('label');
    const name = label?.querySelector('span');
    if (!label || !name) throw new Error(`#${input.id} needs a label and a span.`);
    this.#label = label;
    this.#input = input;
    this.#name = name;
    this.#preview = label.querySelector('img');
    this.#invitation = name.textContent;
    input.addEventListener('change', () => {
      this.#show();
      chosen(this.files);
    });
    // The input covers the label, so files that are dropped go to it by themselves.
    for (const kind of ['dragenter', 'dragover']) input.addEventListener(kind, () => label.classList.add('over'));
    for (const kind of ['dragleave', 'drop']) input.addEventListener(kind, () => label.classList.remove('over'));
  }

  get files() {
    return [...(this.#input.files ?? [])];
  }

  /** Chooses nothing. */
  clear() {
    this.#input.value = '';
    this.#show();
  }

  #show() {
    const files = this.files;
    this.#label.classList.toggle('chosen', files.length > 0);
    this.#name.textContent = files.map(({ name }) => name).join(', ') || this.#invitation;
    if (!this.#preview) return;
    URL.revokeObjectURL(this.#preview.src);
    this.#preview.hidden = files.length === 0;
    this.#preview.src = files.length > 0 ? URL.createObjectURL(files[0]) : '';
  }
}
