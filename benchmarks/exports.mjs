// Times an exported graph in onnxruntime-web: for every line on stdin one call, and its seconds on stdout.
//
//     node exports.mjs GRAPH.onnx INPUTS THREADS
//
// INPUTS is a folder: in inputs.txt a line for each input, its name and its shape, and its numbers in NAME.f32.
import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { createInterface } from 'node:readline';

const [graph, folder, threads] = process.argv.slice(2);
const ort = createRequire(new URL('../samples/portable/web/', import.meta.url))('onnxruntime-web');
ort.env.wasm.numThreads = Number(threads);
const session = await ort.InferenceSession.create(new Uint8Array(await readFile(graph)));

const inputs = {};
for (const line of (await readFile(join(folder, 'inputs.txt'), 'utf8')).trim().split('\n')) {
  const [name, ...shape] = line.split(' ');
  const bytes = new Uint8Array(await readFile(join(folder, `${name}.f32`)));
  inputs[name] = new ort.Tensor('float32', new Float32Array(bytes.buffer), shape.map(Number));
}

for await (const _ of createInterface({ input: process.stdin })) {
  const begin = performance.now();
  await session.run(inputs);
  console.log((performance.now() - begin) / 1000);
}
process.exit(); // its threads would wait for more
