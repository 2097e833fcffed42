// Styles a photograph in Node:
//
//     node node.mjs PHOTO STYLE [--models ../models] [--out stylized.png] [--size 256] [--iterations 20]
//
// With --benchmark the closure is timed on the photograph instead, and JSON is printed.
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import * as ort from 'onnxruntime-web';
import sharp from 'sharp';
import { GRAPHS, Graphs, graphFiles } from './graphs.mjs';
import { fitted, fromPixels, mirrored, toPixels } from './pictures.mjs';
import { WEIGHTS, edges, stylize } from './stylize.mjs';

const CALLS = 7;

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    models: { type: 'string', default: join(import.meta.dirname, '..', 'models') },
    out: { type: 'string', default: 'stylized.png' },
    size: { type: 'string', default: '256' },
    iterations: { type: 'string', default: '20' },
    benchmark: { type: 'boolean', default: false },
  },
});
const [photo, style] = positionals;
const [size, iterations] = [Number(values.size), Number(values.iterations)];
if (!photo || !style || !(size >= 16) || !(iterations >= 1)) {
  console.error(
    'usage: node node.mjs PHOTO STYLE [--models FOLDER] [--out FILE] [--size PX] [--iterations N] [--benchmark]',
  );
  process.exit(2);
}

try {
  const files = [];
  for (const graph of GRAPHS) files.push(await fileOf(graph)); // one by one: it is the first absent one that is named
  const graphs = new Graphs(ort, await graphFiles(files));
  await (values.benchmark ? benchmark(graphs) : run(graphs));
  await graphs.close();
} catch (error) {
  console.error(`${error instanceof Error ? error.message : error}`);
  process.exitCode = 1;
}

/** @param {Graphs} graphs */
async function run(graphs) {
  const sizes = edges(size);
  const scales = await Promise.all(sizes.map(scaleAt));
  let finished = scales[0].content;
  for await (const { scale, iteration, loss, best, picture } of stylize(graphs, { scales, iterations })) {
    console.log(`${sizes[scale]} px  ${iteration}/${iterations}  loss ${loss.toPrecision(5)}`);
    if (best) finished = picture;
  }
  const { width, height } = finished;
  await sharp(toPixels(finished), { raw: { width, height, channels: 4 } })
    .removeAlpha()
    .toFile(values.out);
  console.log(values.out);
}

/** @param {Graphs} graphs */
async function benchmark(graphs) {
  const scale = await scaleAt(size);
  const [targets] = await graphs.targets([scale]);
  const picture = mirrored(scale.content, graphs.margin);
  const seconds = [];
  for (let i = 0; i <= CALLS; i++) {
    const start = performance.now();
    await graphs.evaluate(picture, targets, WEIGHTS);
    seconds.push((performance.now() - start) / 1000);
  }
  const median = seconds.slice(1).sort((a, b) => a - b)[Math.floor(CALLS / 2)]; // the first call allocates
  const runtime = `onnxruntime-web ${ort.env.versions.web}`;
  console.log(JSON.stringify({ runtime, width: picture.width, height: picture.height, calls: CALLS, seconds: median }));
}

/** @param {number} edge */
async function scaleAt(edge) {
  return { content: await pictureAt(photo, edge), style: await pictureAt(style, edge) };
}

/**
 * @param {string} path
 * @param {number} edge of the longer side, pixels
 */
async function pictureAt(path, edge) {
  try {
    const upright = sharp(path).autoOrient().toColourspace('srgb').removeAlpha();
    const { autoOrient } = await upright.metadata();
    const { width, height } = fitted(autoOrient.width, autoOrient.height, edge);
    const pixels = await upright.resize(width, height, { fit: 'fill' }).raw().toBuffer();
    return fromPixels(pixels, width, height, 3);
  } catch (error) {
    throw new Error(`${path} cannot be read as a picture: ${error instanceof Error ? error.message : error}`);
  }
}

/** @param {string} graph */
async function fileOf(graph) {
  const name = `${graph}.onnx`;
  const bytes = await readFile(join(values.models, name)).catch(() => {
    throw new Error(`${join(values.models, name)} is not there; nst-model export --graph ${graph} makes it`);
  });
  return { name, bytes: new Uint8Array(bytes) };
}
