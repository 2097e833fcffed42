const NAMESPACE = 'http://www.w3.org/2000/svg';

/** The loss at each iteration, on a logarithmic scale; a line for each scale, whose losses cannot be compared. */
export class LossChart {
  /** @type {number[][]} */
  #lines = [];
  #svg;
  #length = 1;

  /** @param {SVGSVGElement} svg */
  constructor(svg) {
    this.#svg = svg;
  }

  /** @param {number} length points that there will be */
  begin(length) {
    this.#lines = [];
    this.#length = length;
    this.#draw();
  }

  /**
   * @param {number} scale
   * @param {number} loss
   */
  add(scale, loss) {
    (this.#lines[scale] ??= []).push(Math.log(Math.max(loss, Number.MIN_VALUE)));
    this.#draw();
  }

  #draw() {
    const { width, height } = this.#svg.viewBox.baseVal;
    const values = this.#lines.flat();
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const y = (/** @type {number} */ value) => height - 4 - ((value - low) / (high - low || 1)) * (height - 8);
    let x = 0;
    const lines = this.#lines.map((line) => {
      const points = line.map(
        (value) => `${((x++ / Math.max(this.#length - 1, 1)) * width).toFixed(1)},${y(value).toFixed(1)}`,
      );
      const drawn = document.createElementNS(NAMESPACE, 'polyline');
      drawn.setAttribute('points', points.join(' '));
      return drawn;
    });
    this.#svg.replaceChildren(...lines);
  }
}
