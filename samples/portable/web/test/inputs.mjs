/** What the tests are given by whoever runs them; see tests/portable/test_web.py. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import sharp from 'sharp';
import { GRAPHS } from '../graphs.mjs';
import { fromPixels } from '../pictures.mjs';

export const MODELS = given('NST_TEST_MODELS');
export const PICTURES = given('NST_TEST_PICTURES');
const EXPECTED = given('NST_TEST_EXPECTED');

/** @param {string} name */
export function given(name) {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set: run these tests with pytest tests/portable/test_web.py`);
  return value;
}

/** Loss and gradient at the picture `start`, as another runtime computes them. */
export async function expected() {
  const total = /** @type {number} */ (JSON.parse(await readFile(join(EXPECTED, 'total.json'), 'utf8')));
  const bytes = await readFile(join(EXPECTED, 'gradient.f32'));
  return { total, gradient: new Float32Array(new Uint8Array(bytes).buffer) };
}

export function modelFiles() {
  return Promise.all(GRAPHS.map((graph) => fileOf(join(MODELS, `${graph}.onnx`))));
}

/** @param {string} path */
export async function fileOf(path) {
  return { name: /** @type {string} */ (path.split('/').at(-1)), bytes: new Uint8Array(await readFile(path)) };
}

/** @param {string} name */
export async function picture(name) {
  const { data, info } = await sharp(join(PICTURES, `${name}.png`))
    .raw()
    .toBuffer({ resolveWithObject: true });
  return fromPixels(data, info.width, info.height, 3);
}
