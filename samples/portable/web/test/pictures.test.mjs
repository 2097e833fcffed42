import assert from 'node:assert/strict';
import { test } from 'node:test';
import { enlarged, fitted, fromPixels, mirrored, toPixels, trimmed } from '../pictures.mjs';

const ROW = { width: 4, height: 1, data: Float32Array.of(0, 0.25, 0.5, 1, 0, 0, 0, 0, 1, 1, 1, 1) };

test('pixels become planes in [0, 1], and planes pixels', () => {
  const pixels = Uint8Array.of(0, 51, 255, 255, 102, 0, 255, 255);
  const { data } = fromPixels(pixels, 2, 1, 4);
  assert.deepEqual(
    [...data].map((value) => Math.round(value * 5)),
    [0, 2, 1, 0, 5, 5],
  );
  assert.deepEqual([...toPixels({ width: 2, height: 1, data })], [...pixels]);
});

test('what lies beyond [0, 1] is clipped when it is shown', () => {
  assert.deepEqual([...toPixels({ width: 1, height: 1, data: Float32Array.of(-1, 2, 0.5) })], [0, 255, 128, 255]);
});

test('a mirrored picture does not repeat its edge, and goes to and fro where the margin is wider than it is', () => {
  const { data, width, height } = mirrored(
    { width: 3, height: 2, data: Float32Array.from({ length: 18 }, (_, i) => i) },
    3,
  );
  assert.deepEqual([width, height], [9, 8]);
  assert.deepEqual([...data.slice(0, 9)], [4, 5, 4, 3, 4, 5, 4, 3, 4]);
});

test('trimmed undoes mirrored', () => {
  const picture = { width: 5, height: 4, data: Float32Array.from({ length: 60 }, (_, i) => i) };
  assert.deepEqual(trimmed(mirrored(picture, 16), 16), picture);
});

test('an enlarged picture has the same corners, and is smooth between them', () => {
  const { data } = enlarged(ROW, 8, 2);
  const expected = [0, 0.0625, 0.1875, 0.3125, 0.4375, 0.625, 0.875, 1];
  for (const row of [data.slice(0, 8), data.slice(8, 16)]) {
    row.forEach((value, i) => assert.ok(Math.abs(value - expected[i]) < 1e-6, `${row}`));
  }
});

test('a picture is fitted by its longer edge, and never to less than 16 pixels', () => {
  assert.deepEqual(fitted(451, 300, 128), { width: 128, height: 85 });
  assert.deepEqual(fitted(300, 3000, 128), { width: 16, height: 128 });
});
