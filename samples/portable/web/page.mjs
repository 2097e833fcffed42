/**
 * The page: what is chosen on it, and what the worker reports.
 *
 * @import { Order, Progress, Report } from './worker.mjs'
 */
import { LossChart } from './chart.mjs';
import { Chooser } from './chooser.mjs';
import { graphFiles } from './graphs.mjs';
import { MODELS } from './models.mjs';
import { edges } from './stylize.mjs';

const STYLES = new URL('../../styles/', import.meta.url);

const form = element('order', HTMLFormElement);
const choices = element('choices', HTMLFieldSetElement);
const start = element('start', HTMLButtonElement);
const stop = element('stop', HTMLButtonElement);
const size = element('size', HTMLSelectElement);
const iterations = element('iterations', HTMLInputElement);
const device = element('device', HTMLSelectElement);
const canvas = element('picture', HTMLCanvasElement);
const empty = element('empty', HTMLElement);
const progress = element('progress', HTMLProgressElement);
const status = element('status', HTMLElement);
const details = element('details', HTMLElement);
const problem = element('error', HTMLElement);
const download = element('download', HTMLButtonElement);
const curve = element('curve', HTMLElement);
const loss = element('loss', HTMLElement);
const chart = new LossChart(element('chart', SVGSVGElement));

const photo = new Chooser(element('photo', HTMLInputElement), () => forgive());
const ownStyle = new Chooser(element('own-style', HTMLInputElement), ([file]) => {
  forgive();
  for (const sample of samples()) sample.checked = !file && sample.defaultChecked;
});
const models = new Chooser(element('models', HTMLInputElement), (files) => void check(files));

/** @type {Worker | null} */
let worker = null;
/** When the run's first iterate came, milliseconds, and what part of the run was done with it. */
let first = { time: 0, work: 0 };

empty.textContent = 'The picture appears here, and takes shape while you watch.';
for (const sample of samples()) sample.addEventListener('change', () => ownStyle.clear());
form.addEventListener('submit', (event) => {
  event.preventDefault();
  void begin();
});
stop.addEventListener('click', () => end('Stopped.'));
download.addEventListener('click', save);
await Promise.all([isolate(), offerGpu(), lookForModel()]);
document.documentElement.dataset.ready = '';

/** Starts a run with what is chosen, or says what is missing. */
async function begin() {
  forgive();
  const [photograph] = photo.files;
  if (!photograph) return complain('Choose a photograph first.');
  if (!iterations.checkValidity()) {
    return complain(
      `Iterations must be a whole number from ${iterations.min} to ${iterations.max}, not ${iterations.value}.`,
    );
  }
  try {
    const order = /** @type {Order} */ ({
      photo: photograph,
      style: ownStyle.files[0] ?? (await sampleStyle()),
      models: models.files.length > 0 ? models.files : null,
      size: Number(size.value),
      iterations: iterations.valueAsNumber,
      device: device.value,
    });
    run(order);
  } catch (error) {
    complain(/** @type {Error} */ (error).message);
  }
}

/** @param {Order} order */
function run(order) {
  choices.disabled = true;
  start.hidden = true;
  stop.hidden = false;
  progress.hidden = false;
  progress.removeAttribute('value');
  stop.focus({ preventScroll: true });
  element('easel', HTMLElement).scrollIntoView({ block: 'nearest' });
  chart.begin(edges(order.size).length * (order.iterations + 1));
  curve.hidden = true;
  say('Loading the model', '');
  worker = new Worker(new URL('worker.mjs', import.meta.url), { type: 'module' });
  worker.onmessage = (/** @type {MessageEvent<Report>} */ { data }) => receive(data, order);
  worker.onerror = (event) => {
    end('');
    complain(`The worker failed: ${event.message ?? 'a file of the page could not be loaded'}.`);
  };
  worker.postMessage(order);
}

/**
 * @param {Report} report
 * @param {Order} order
 */
function receive(report, order) {
  switch (report.kind) {
    case 'loading':
      return say('Loading the model', `${megabytes(report.done)} of ${megabytes(report.total)} MB`);
    case 'preparing':
      return say(`Looking at both pictures with ${report.model}`, '');
    case 'progress':
      return show(report, order);
    case 'done':
      return end('Done.');
    case 'failed':
      end('');
      return complain(report.message);
  }
}

/**
 * @param {Progress} report
 * @param {Order} order
 */
function show({ scale, iteration, loss: value, work, picture }, order) {
  const scales = edges(order.size);
  const now = performance.now();
  if (scale === 0 && iteration === 0) first = { time: now, work };
  if (picture) paint(picture);
  progress.value = work;
  curve.hidden = false;
  chart.add(scale, value);
  loss.textContent = value.toPrecision(4);
  const seconds = ((now - first.time) / 1000 / (work - first.work)) * (1 - work);
  const left = Number.isFinite(seconds) ? ` · about ${duration(seconds)} left` : '';
  const where = scales.length > 1 ? `, size ${scale + 1} of ${scales.length}` : '';
  say(`Painting at ${scales[scale]} px${where}`, `iteration ${iteration} of ${order.iterations}${left}`);
}

/** @param {ImageData} picture */
function paint(picture) {
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.getContext('2d')?.putImageData(picture, 0, 0);
  canvas.hidden = download.hidden = false;
  empty.hidden = true;
}

/**
 * Ends the run, finished or not; the picture stays.
 *
 * @param {string} outcome
 */
function end(outcome) {
  worker?.terminate();
  worker = null;
  choices.disabled = false;
  start.hidden = false;
  stop.hidden = progress.hidden = true;
  say(outcome, '');
}

function save() {
  canvas.toBlob((blob) => {
    if (!blob) return;
    const link = document.createElement('a');
    link.href = URL.createObjectURL(blob);
    link.download = 'stylized.png';
    link.click();
    URL.revokeObjectURL(link.href);
  });
}

/**
 * Says at once what is wrong with the files of a model.
 *
 * @param {File[]} files
 */
async function check(files) {
  forgive();
  if (files.length === 0) return;
  try {
    const read = files.map(async (file) => ({ name: file.name, bytes: new Uint8Array(await file.arrayBuffer()) }));
    await graphFiles(await Promise.all(read));
  } catch (error) {
    models.clear();
    complain(/** @type {Error} */ (error).message);
  }
}

/** Says whether there is a model beside the page, and how to get one if not. */
async function lookForModel() {
  const found = await Promise.all(MODELS.map((url) => fetch(url, { method: 'HEAD' })));
  const hint = element('models-hint', HTMLElement);
  if (found.every(({ ok }) => ok)) {
    hint.textContent = 'The one beside this page, unless you choose another.';
    return;
  }
  const code = document.createElement('code');
  code.textContent = 'nst-model export';
  hint.replaceChildren('There is none beside this page. Choose the three files that ', code, ' makes.');
}

/** Offers WebGPU where there is an adapter, and prefers it unless it is itself computed by the CPU. */
async function offerGpu() {
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter) return;
  device.add(new Option('GPU', 'webgpu'), 0);
  if (!adapter.info.isFallbackAdapter) device.value = 'webgpu';
}

/** Lets WebAssembly use threads, by a service worker that sets the headers; that takes loading the page anew. */
async function isolate() {
  if (crossOriginIsolated || !navigator.serviceWorker) return;
  try {
    const { active } = await navigator.serviceWorker.register(new URL('service-worker.js', import.meta.url));
    if (active) return; // it is there, and the browser went round it: reloading would not end
    await navigator.serviceWorker.ready;
    location.reload();
  } catch (error) {
    console.warn('There is no service worker, so there is one thread.', error);
  }
}

async function sampleStyle() {
  const name = samples().find(({ checked }) => checked)?.value;
  const response = await fetch(new URL(`${name}.jpg`, STYLES));
  if (!response.ok)
    throw new Error(`The sample ${name} is not there (${response.status}): choose a style of your own.`);
  return response.blob();
}

function samples() {
  return [...form.querySelectorAll('input[name=style]')].filter((input) => input instanceof HTMLInputElement);
}

/** @param {string} message */
function complain(message) {
  problem.textContent = message;
  problem.hidden = false;
  problem.scrollIntoView({ block: 'nearest' });
}

function forgive() {
  problem.hidden = true;
}

/**
 * Says where the run stands: what is read out to who does not see, and what changes too often for that.
 *
 * @param {string} stage
 * @param {string} more
 */
function say(stage, more) {
  if (status.textContent !== stage) status.textContent = stage;
  details.textContent = more;
}

/** @param {number} seconds */
function duration(seconds) {
  return seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.round(seconds / 60)} min`;
}

/** @param {number} bytes */
function megabytes(bytes) {
  return (bytes / 1e6).toFixed();
}

/**
 * @template {Element} T
 * @param {string} id
 * @param {new () => T} kind
 */
function element(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`The page has no ${kind.name} #${id}.`);
  return found;
}
