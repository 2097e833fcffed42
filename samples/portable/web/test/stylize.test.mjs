import assert from 'node:assert/strict';
import { test } from 'node:test';
import * as ort from 'onnxruntime-web';
import { Graphs, graphFiles } from '../graphs.mjs';
import { mirrored } from '../pictures.mjs';
import { WEIGHTS, edges, stylize } from '../stylize.mjs';
import { expected, modelFiles, picture } from './inputs.mjs';

const graphs = new Graphs(ort, await graphFiles(await modelFiles()));
const scale = { content: await picture('photo'), style: await picture('style') };

test('loss and gradient are those that another runtime computes', async () => {
  const [targets] = await graphs.targets([scale]);
  const { total, gradient } = await graphs.evaluate(mirrored(await picture('start'), graphs.margin), targets, WEIGHTS);
  const wanted = await expected();
  assert.ok(Math.abs(total / wanted.total - 1) < 1e-5, `${total} is not ${wanted.total}`);
  const distance = norm(gradient.map((value, i) => value - wanted.gradient[i])) / norm(wanted.gradient);
  assert.ok(distance < 1e-5, `the gradient is ${distance} off`);
});

test('a short run lowers the loss, and its last best iterate is the finished picture', async () => {
  const losses = [];
  let finished = scale.content;
  for await (const { loss, best, picture } of stylize(graphs, { scales: [scale], iterations: 6 })) {
    losses.push(loss);
    if (best) finished = picture;
  }
  assert.equal(losses.length, 7);
  assert.ok(losses[6] < losses[0] / 2, `${losses}`);
  assert.deepEqual([finished.width, finished.height], [scale.content.width, scale.content.height]);
  assert.notDeepEqual(finished.data, scale.content.data);
});

test('scales grow by √2 up to the size asked for', () => {
  assert.deepEqual(edges(256), [128, 181, 256]);
  assert.deepEqual(edges(192), [136, 192]);
  assert.deepEqual(edges(64), [64]);
});

/** @param {Float32Array} vector */
function norm(vector) {
  return Math.sqrt(vector.reduce((total, value) => total + value ** 2, 0));
}
