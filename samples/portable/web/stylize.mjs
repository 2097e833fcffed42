/**
 * Style transfer by optimization (Gatys, Ecker and Bethge, 2016), from coarse to fine, without a server: an exported
 * closure and L-BFGS.
 *
 * @import { Graphs, Targets, Weights } from './graphs.mjs'
 * @import { Picture } from './pictures.mjs'
 */
import { LBFGS } from './lbfgs.mjs';
import { enlarged, mirrored, trimmed } from './pictures.mjs';

/** @type {Weights} weights that look right for every photograph and style tried, with average pooling */
export const WEIGHTS = {
  content: 1,
  style: 20,
  variation: 200,
  layers: { relu1_1: 256, relu2_1: 64, relu3_1: 16, relu4_1: 4, relu5_1: 1 },
};

/**
 * @typedef {object} Iterate one point of the optimization
 * @property {number} scale 0 is the coarsest
 * @property {number} iteration from 0 at each scale
 * @property {number} loss losses of different scales cannot be compared
 * @property {boolean} best whether none of its scale had a lower loss
 * @property {Picture} picture unclipped
 */

/**
 * Yields the iterates of a run, the finished picture being the last with `best`.
 *
 * @param {Graphs} graphs
 * @param {object} run
 * @param {{ content: Picture, style: Picture }[]} run.scales the pictures at each size, the coarsest first
 * @param {number} run.iterations at each scale, each one evaluation of the closure
 * @param {Weights} [run.weights]
 * @returns {AsyncGenerator<Iterate, void, void>}
 */
export async function* stylize(graphs, { scales, iterations, weights = WEIGHTS }) {
  const targets = await graphs.targets(scales);
  let start = scales[0].content;
  for (const [scale, { content }] of scales.entries()) {
    start = enlarged(start, content.width, content.height);
    for await (const iterate of descent(graphs, { start, targets: targets[scale], iterations, weights })) {
      if (iterate.best) start = iterate.picture;
      yield { ...iterate, scale };
    }
  }
}

/**
 * Returns the longer edges of the scales up to `edge`: they grow by √2, and none is smaller than `first`.
 *
 * @param {number} edge pixels
 * @param {number} [first] pixels
 */
export function edges(edge, first = 128) {
  const found = [edge];
  for (let i = 1; Math.round(edge / 2 ** (i / 2)) >= first; i++) found.unshift(Math.round(edge / 2 ** (i / 2)));
  return found;
}

/**
 * Yields the iterates at one scale.
 *
 * @param {Graphs} graphs
 * @param {{ start: Picture, targets: Targets, iterations: number, weights: Weights }} descent
 * @returns {AsyncGenerator<Omit<Iterate, 'scale'>, void, void>}
 */
async function* descent(graphs, { start, targets, iterations, weights }) {
  const { width, height, data } = mirrored(start, graphs.margin);
  const optimizer = new LBFGS(data);
  let lowest = Infinity;
  for (let iteration = 0; iteration <= iterations; iteration++) {
    const picture = { width, height, data: optimizer.x };
    const { total, gradient } = await graphs.evaluate(picture, targets, weights);
    if (iteration === 0 && !Number.isFinite(total)) throw new Error(`The loss is ${total} at the start.`);
    optimizer.step(total, gradient);
    const best = total < lowest;
    if (best) lowest = total;
    yield { iteration, loss: total, best, picture: trimmed(picture, graphs.margin) };
  }
}
