import assert from 'node:assert/strict';
import { test } from 'node:test';
import { LBFGS } from '../lbfgs.mjs';

/**
 * Returns the losses of so many iterations, and the point that they end at.
 *
 * @param {(x: Float32Array) => { loss: number, gradient: Float32Array }} objective
 * @param {number[]} start
 * @param {number} iterations
 */
function minimize(objective, start, iterations) {
  const optimizer = new LBFGS(Float32Array.from(start));
  const losses = [];
  for (let i = 0; i < iterations; i++) {
    const { loss, gradient } = objective(optimizer.x);
    losses.push(loss);
    optimizer.step(loss, gradient);
  }
  return { losses, x: optimizer.x };
}

/** A valley, curved a thousand times more across than along. */
const valley = (/** @type {Float32Array} */ x) => ({
  loss: x.reduce((total, value, i) => total + 0.5 * (i + 1) ** 3 * (value - 0.3) ** 2, 0),
  gradient: x.map((value, i) => (i + 1) ** 3 * (value - 0.3)),
});

/** Rosenbrock's banana, whose minimum is at (1, 1). */
const banana = (/** @type {Float32Array} */ [a, b]) => ({
  loss: (1 - a) ** 2 + 100 * (b - a * a) ** 2,
  gradient: Float32Array.of(-2 * (1 - a) - 400 * a * (b - a * a), 200 * (b - a * a)),
});

test('the minimum of a quadratic valley is found', () => {
  const { x } = minimize(valley, Array(10).fill(0), 80);
  for (const value of x) assert.ok(Math.abs(value - 0.3) < 1e-3, `${x}`);
});

test("the minimum of Rosenbrock's function is found", () => {
  const { x } = minimize(banana, [-1.2, 1], 300);
  assert.ok(Math.hypot(x[0] - 1, x[1] - 1) < 1e-2, `${x}`);
});

test('no step is longer than the cap, the first one shorter still', () => {
  const optimizer = new LBFGS(Float32Array.of(-50, 50));
  let before = optimizer.x;
  for (let i = 0; i < 20; i++) {
    const { loss, gradient } = banana(before);
    optimizer.step(loss, gradient);
    const rms = Math.hypot(...optimizer.x.map((value, j) => value - before[j])) / Math.SQRT2;
    assert.ok(rms < (i === 0 ? 0.02 : 0.05) * 1.001, `step ${i} is ${rms} long`);
    before = optimizer.x;
  }
});

test('a step that overshoots, or meets no number at all, is taken back in part', () => {
  for (const wild of [1e9, NaN]) {
    const optimizer = new LBFGS(Float32Array.of(0));
    optimizer.step(1, Float32Array.of(-1));
    assert.ok(Math.abs(optimizer.x[0] - 0.02) < 1e-6);
    optimizer.step(wild, Float32Array.of(wild));
    assert.ok(Math.abs(optimizer.x[0] - 0.005) < 1e-6, `${optimizer.x}`);
  }
});

test('each step goes along -H·g, H being made of the last pairs only', () => {
  const history = 3;
  const optimizer = new LBFGS(Float32Array.of(1, 2, 0.5, 1.5), history);
  /** @type {{ x: number[], g: number[] }[]} */
  const points = [];
  for (let i = 0; i < 8; i++) {
    const { loss, gradient } = valley(optimizer.x);
    points.push({ x: [...optimizer.x], g: [...gradient] });
    optimizer.step(loss, gradient);
    const step = [...optimizer.x].map((value, j) => value - points[i].x[j]);
    const wanted = direction(points.slice(-history - 1));
    const cosine = dot(step, wanted) / Math.sqrt(dot(step, step) * dot(wanted, wanted));
    assert.ok(cosine > 1 - 1e-6, `step ${i} is ${step}, not along ${wanted}`);
  }
});

test('what it is given it neither changes nor keeps', () => {
  const [start, gradient] = [Float32Array.of(0.5, 0.25), Float32Array.of(1, -2)];
  const [one, other] = [new LBFGS(start), new LBFGS(start.slice())];
  start.fill(9);
  one.step(1, gradient);
  assert.deepEqual(gradient, Float32Array.of(1, -2));
  gradient.fill(9);
  other.step(1, Float32Array.of(1, -2));
  for (const optimizer of [one, other]) optimizer.step(0.9, Float32Array.of(0.5, -0.5));
  assert.deepEqual(one.x, other.x);
});

test('where the gradient is 0 it stays', () => {
  const { x } = minimize(() => ({ loss: 1, gradient: new Float32Array(2) }), [0.5, 0.25], 3);
  assert.deepEqual([...x], [0.5, 0.25]);
});

/**
 * Returns -H·g at the last of some points, H being written out: Nocedal and Wright, equation 7.16, in float64.
 *
 * @param {{ x: number[], g: number[] }[]} points
 */
function direction(points) {
  const pairs = points.slice(1).map(({ x, g }, i) => ({
    s: x.map((value, j) => value - points[i].x[j]),
    y: g.map((value, j) => value - points[i].g[j]),
  }));
  const { g } = points[points.length - 1];
  const newest = pairs.at(-1);
  const gamma = newest ? dot(newest.s, newest.y) / dot(newest.y, newest.y) : 1;
  let h = g.map((_, i) => g.map((_, j) => (i === j ? gamma : 0)));
  for (const { s, y } of pairs) {
    const rho = 1 / dot(s, y);
    const hy = h.map((row) => dot(row, y));
    const yhy = dot(y, hy);
    h = h.map((row, i) =>
      row.map((value, j) => value - rho * (s[i] * hy[j] + hy[i] * s[j]) + rho * (rho * yhy + 1) * s[i] * s[j]),
    );
  }
  return h.map((row) => -dot(row, g));
}

/**
 * @param {number[]} a
 * @param {number[]} b
 */
function dot(a, b) {
  return a.reduce((total, value, i) => total + value * b[i], 0);
}
