// Times an exported graph in onnxruntime-web: for every line on stdin one call, and its seconds on stdout.
//
//     node exports.mjs GRAPH.onnx INPUTS THREADS [CHROMIUM]
//
// INPUTS is a folder: in inputs.txt a line for each input, its name and its shape, and its numbers in NAME.f32.
// With CHROMIUM, the program of that name, the calls are made in a page of it, and else in Node.
import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { CHROMIUM_FLAGS, serve } from '../samples/portable/web/test/browser.mjs';

const [graph, folder, threads, chromium] = process.argv.slice(2);
const require = createRequire(new URL('../samples/portable/web/', import.meta.url));
const list = (await readFile(join(folder, 'inputs.txt'), 'utf8')).trim().split('\n');
const inputs = list.map((line) => {
  const [name, ...shape] = line.split(' ');
  return { name, shape: shape.map(Number) };
});
const call = chromium ? await inBrowser() : await inNode();
for await (const _ of createInterface({ input: process.stdin })) console.log(await call());
process.exit(); // its threads would wait for more

async function inNode() {
  const ort = require('onnxruntime-web');
  const read = async (path) => new Uint8Array(await readFile(path)).buffer;
  const files = await Promise.all(inputs.map(({ name }) => read(join(folder, `${name}.f32`))));
  return prepared(ort, { threads: Number(threads), inputs, graph: await read(graph), files });
}

async function inBrowser() {
  const files = inputs.map(({ name }) => [`/input/${name}`, join(folder, `${name}.f32`)]);
  const { url } = await serve(Object.fromEntries([['/graph.onnx', graph], ...files]));
  const { chromium: browsers } = require('playwright-core');
  const browser = await browsers.launch({ executablePath: chromium, args: CHROMIUM_FLAGS });
  const page = await browser.newPage();
  await page.goto(`${url}/portable/web/`);
  await page.waitForSelector('html[data-ready]'); // isolated, so that there may be threads
  await page.addScriptTag({ content: prepared.toString() });
  await page.evaluate(
    async ({ threads, inputs }) => {
      const { runtimeOf } = await import(new URL('runtime.mjs', location.href).href);
      const read = async (path) => (await fetch(path)).arrayBuffer();
      const files = await Promise.all(inputs.map(({ name }) => read(`/input/${name}`)));
      const graph = await read('/graph.onnx');
      window.call = await prepared(await runtimeOf('wasm'), { threads, inputs, graph, files });
    },
    { threads: Number(threads), inputs },
  );
  return () => page.evaluate(() => window.call());
}

// Returns a function that makes one call and returns its seconds.
async function prepared(ort, { threads, inputs, graph, files }) {
  ort.env.wasm.numThreads = threads;
  const session = await ort.InferenceSession.create(new Uint8Array(graph));
  const tensors = inputs.map(({ name, shape }, number) => {
    return [name, new ort.Tensor('float32', new Float32Array(files[number]), shape)];
  });
  const given = Object.fromEntries(tensors);
  return async () => {
    const begin = performance.now();
    await session.run(given);
    return (performance.now() - begin) / 1000;
  };
}
