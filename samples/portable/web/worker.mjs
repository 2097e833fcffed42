/**
 * The page's worker: loads the models and styles the photograph, so that the page stays responsive. It takes one message,
 * the `Order`, and posts `Report`s; to stop it, terminate it.
 *
 * @import { Picture } from './pictures.mjs'
 */
import { Graphs, graphFiles } from './graphs.mjs';
import { MODELS } from './models.mjs';
import { fitted, fromPixels, toPixels } from './pictures.mjs';
import { runtimeOf } from './runtime.mjs';
import { edges, stylize } from './stylize.mjs';

/**
 * @typedef {object} Order
 * @property {Blob} photo
 * @property {Blob} style
 * @property {File[] | null} models the files of the graphs; null for the model beside the page
 * @property {number} size longer edge of the finished picture, pixels
 * @property {number} iterations at each scale
 * @property {'wasm' | 'webgpu'} device
 */

/**
 * @typedef {{ kind: 'loading', done: number, total: number }} Loading bytes of the models
 * @typedef {{ kind: 'preparing', model: string }} Preparing the model's name for people
 * @typedef {object} Progress
 * @property {'progress'} kind
 * @property {number} scale
 * @property {number} scales
 * @property {number} iteration
 * @property {number} loss
 * @property {number} work part of the run that is done, by pixels
 * @property {ImageData | null} picture null if there is no better one than the last
 * @typedef {{ kind: 'done' }} Done
 * @typedef {{ kind: 'failed', message: string }} Failed
 * @typedef {Loading | Preparing | Progress | Done | Failed} Report
 */

/** @param {Report} report */
const post = (report) => self.postMessage(report);

self.onmessage = async (/** @type {MessageEvent<Order>} */ { data: order }) => {
  try {
    await run(order);
    post({ kind: 'done' });
  } catch (error) {
    post({ kind: 'failed', message: error instanceof Error ? error.message : String(error) });
  }
};

/** @param {Order} order */
async function run({ photo, style, models, size, iterations, device }) {
  const sizes = edges(size);
  // The pictures first: what is wrong with them is said before 100 MB are loaded.
  const scales = [];
  for (const edge of sizes) {
    const content = await pictureOf(photo, edge, 'The photograph');
    scales.push({ content, style: await pictureOf(style, edge, 'The style') });
  }
  const files = models ? await Promise.all(models.map(bytesOf)) : await besideThePage();
  const ort = await runtimeOf(device);
  const graphs = new Graphs(ort, await graphFiles(files), { executionProviders: [device] });
  post({ kind: 'preparing', model: graphs.description.model_display_name });
  const work = sizes.map((edge) => edge ** 2);
  const whole = sum(work) * iterations;
  for await (const { scale, iteration, loss, best, picture } of stylize(graphs, { scales, iterations })) {
    post({
      kind: 'progress',
      scale,
      scales: sizes.length,
      iteration,
      loss,
      work: (sum(work.slice(0, scale)) * iterations + work[scale] * iteration) / whole,
      picture: best ? new ImageData(toPixels(picture), picture.width) : null,
    });
  }
}

/**
 * @param {Blob} file
 * @param {number} edge of the longer side, pixels
 * @param {string} what for messages
 */
async function pictureOf(file, edge, what) {
  const whole = await createImageBitmap(file).catch(() => {
    throw new Error(`${what} is in no format that this browser reads: choose a JPEG, PNG or WebP file.`);
  });
  const { width, height } = fitted(whole.width, whole.height, edge);
  const small = await createImageBitmap(whole, { resizeWidth: width, resizeHeight: height, resizeQuality: 'high' });
  whole.close();
  const context = new OffscreenCanvas(width, height).getContext('2d');
  if (!context) throw new Error('This browser has no memory left for a canvas.');
  context.fillStyle = 'white';
  context.fillRect(0, 0, width, height);
  context.drawImage(small, 0, 0);
  return fromPixels(context.getImageData(0, 0, width, height).data, width, height, 4);
}

/** Returns the files of the model beside the page, reporting their bytes as they come. */
async function besideThePage() {
  const responses = await Promise.all(MODELS.map((url) => fetch(url)));
  const absent = responses.find(({ ok }) => !ok);
  if (absent) throw new Error(`${absent.url} is not there (${absent.status}): choose the files of a model.`);
  const total = sum(responses.map(({ headers }) => Number(headers.get('content-length'))));
  let done = 0;
  const counted = () =>
    new TransformStream({
      transform(part, controller) {
        done += part.length;
        post({ kind: 'loading', done, total });
        controller.enqueue(part);
      },
    });
  return Promise.all(
    responses.map(async ({ body, url }) => {
      const bytes = await new Response(body?.pipeThrough(counted())).arrayBuffer();
      return { name: url.slice(url.lastIndexOf('/') + 1), bytes: new Uint8Array(bytes) };
    }),
  );
}

/** @param {File} file */
async function bytesOf(file) {
  return { name: file.name, bytes: new Uint8Array(await file.arrayBuffer()) };
}

/** @param {number[]} values */
function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}
