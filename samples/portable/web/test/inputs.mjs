/** What the tests are given by whoever runs them; see tests/portable/test_web.py. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import sharp from 'sharp';
import { GRAPHS } from '../graphs.mjs';
import { fromPixels } from '../pictures.mjs';

/** @param {string} name */
export function given(name) {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set: run these tests with pytest tests/portable/test_web.py`);
  return value;
}

/** @param {string} graph */
export const modelPath = (graph) => join(given('NST_TEST_MODELS'), `${graph}.onnx`);

/** @param {string} name */
export const picturePath = (name) => join(given('NST_TEST_PICTURES'), `${name}.png`);

/** Loss and gradient at the picture `start`, as another runtime computes them. */
export async function expected() {
  const folder = given('NST_TEST_EXPECTED');
  const total = /** @type {number} */ (JSON.parse(await readFile(join(folder, 'total.json'), 'utf8')));
  const bytes = await readFile(join(folder, 'gradient.f32'));
  return { total, gradient: new Float32Array(new Uint8Array(bytes).buffer) };
}

export function modelFiles() {
  return Promise.all(GRAPHS.map((graph) => fileOf(modelPath(graph))));
}

/** @param {string} path */
export async function fileOf(path) {
  return { name: /** @type {string} */ (path.split('/').at(-1)), bytes: new Uint8Array(await readFile(path)) };
}

/** @param {string} name */
export async function picture(name) {
  const { data, info } = await sharp(picturePath(name)).raw().toBuffer({ resolveWithObject: true });
  return fromPixels(data, info.width, info.height, 3);
}
