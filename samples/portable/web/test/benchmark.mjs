// Times the closure in headless Chromium, and prints JSON:
//
//     node test/benchmark.mjs [--models ../models] [--size 256] [--chromium /usr/bin/chromium]
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { chromium } from 'playwright-core';
import { GRAPHS } from '../graphs.mjs';
import { CHROMIUM_FLAGS, serve } from './browser.mjs';

const CALLS = 7;

const { values } = parseArgs({
  options: {
    models: { type: 'string', default: join(import.meta.dirname, '..', '..', 'models') },
    size: { type: 'string', default: '256' },
    chromium: { type: 'string', default: '/usr/bin/chromium' },
  },
});

const { url, close } = await serve(
  Object.fromEntries(GRAPHS.map((graph) => [`/portable/models/${graph}.onnx`, join(values.models, `${graph}.onnx`)])),
);
const browser = await chromium.launch({ executablePath: values.chromium, args: CHROMIUM_FLAGS });
try {
  const page = await browser.newPage();
  await page.goto(`${url}/portable/web/`);
  await page.waitForSelector('html[data-ready]');
  const { threads, ort, ...figures } = await page.evaluate(measured, { edge: Number(values.size), calls: CALLS });
  const runtime = `Chromium ${browser.version()}, onnxruntime-web ${ort}, ${threads} threads`;
  console.log(JSON.stringify({ runtime, ...figures }));
} finally {
  await browser.close();
  close();
}

/**
 * Runs in the page, as its worker would; returns the median time of a call for a picture of 3:2.
 *
 * @param {{ edge: number, calls: number }} how
 */
async function measured({ edge, calls }) {
  const load = (/** @type {string} */ path) => import(new URL(path, location.href).href);
  const [{ Graphs, graphFiles }, { MODELS }, { mirrored }, { WEIGHTS }, { runtimeOf }] = await Promise.all(
    ['graphs.mjs', 'models.mjs', 'pictures.mjs', 'stylize.mjs', 'runtime.mjs'].map(load),
  );
  const files = MODELS.map(async (/** @type {URL} */ file) => ({
    name: file.pathname,
    bytes: new Uint8Array(await (await fetch(file)).arrayBuffer()),
  }));
  const ort = await runtimeOf('wasm');
  const graphs = new Graphs(ort, await graphFiles(await Promise.all(files)), { executionProviders: ['wasm'] });
  const [width, height] = [edge, Math.round((edge * 2) / 3)];
  const random = () => ({ width, height, data: Float32Array.from({ length: 3 * width * height }, Math.random) });
  const [targets] = await graphs.targets([{ content: random(), style: random() }]);
  const picture = mirrored(random(), graphs.margin);
  const seconds = [];
  for (let call = 0; call <= calls; call++) {
    const start = performance.now();
    await graphs.evaluate(picture, targets, WEIGHTS);
    seconds.push((performance.now() - start) / 1000);
  }
  const median = seconds.slice(1).sort((a, b) => a - b)[Math.floor(calls / 2)]; // the first call allocates
  return {
    ort: ort.env.versions.web,
    threads: ort.env.wasm.numThreads,
    width: picture.width,
    height: picture.height,
    calls,
    seconds: median,
  };
}
