/**
 * L-BFGS (Liu and Nocedal, 1989) with one evaluation an iteration.
 *
 * Symbols, as in Nocedal and Wright (2006), chapter 7: point x, gradient g, remembered pairs s = x' - x and y = g' - g,
 * ρ = 1 / sᵀy, initial inverse Hessian γ·I, search direction d = -H·g.
 *
 * There is no line search, which would cost evaluations. The unknowns are pixels in [0, 1], so a cap on a step's root
 * mean square has a meaning, and removes the overshoot of the first iterations, when γ comes from a single pair. A step
 * that overshoots all the same is taken back in part.
 */

/** Root mean square of the first step: there is no curvature yet to tell its length. */
const FIRST_STEP_RMS = 0.02;
/** Largest root mean square of any later step. */
const MAX_STEP_RMS = 0.05;
/** A step that multiplies the loss by more than this is taken back in part. */
const OVERSHOOT = 2;
/** The part of such a step that is kept. */
const KEPT = 0.25;
/** Pairs with sᵀy ≤ this times yᵀy are left out: they would make H indefinite. */
const MIN_CURVATURE = 1e-10;

/** @typedef {{ s: Float32Array, y: Float32Array, rho: number, gamma: number }} Pair */

export class LBFGS {
  /** @type {Pair[]} oldest first */
  #pairs = [];
  /** @type {Float32Array | null} the step that was made last */
  #s = null;
  /** @type {Float32Array | null} the gradient where it was made from */
  #g = null;
  #loss = Infinity;
  #history;

  /**
   * @param {Float32Array} start first point, copied
   * @param {number} [history] pairs to remember; they take 8 bytes for each unknown
   */
  constructor(start, history = 20) {
    /** The current point; each step replaces it, none modifies it. */
    this.x = start.slice();
    this.#history = history;
  }

  /**
   * Moves `x`, given the loss and its gradient there.
   *
   * @param {number} loss
   * @param {Float32Array} gradient copied
   */
  step(loss, gradient) {
    if (this.#s && !(loss <= OVERSHOOT * this.#loss)) {
      this.#takeBack(this.#s);
      return;
    }
    if (this.#s && this.#g) this.#remember(this.#s, difference(gradient, this.#g));
    const d = this.#direction(gradient);
    const rms = Math.sqrt(dot(d, d) / d.length);
    const curved = this.#pairs.length > 0;
    const length = (curved ? MAX_STEP_RMS : FIRST_STEP_RMS) / rms;
    if (rms > 0 && (!curved || length < 1)) scale(d, length);
    this.x = sum(this.x, d);
    this.#s = d;
    this.#g = gradient.slice();
    this.#loss = loss;
  }

  /** @param {Float32Array} s */
  #takeBack(s) {
    const back = s.slice();
    scale(back, KEPT - 1);
    this.x = sum(this.x, back);
    scale(s, KEPT);
  }

  /**
   * @param {Float32Array} s
   * @param {Float32Array} y
   */
  #remember(s, y) {
    const sy = dot(s, y);
    const yy = dot(y, y);
    if (!(sy > MIN_CURVATURE * yy)) return;
    this.#pairs.push({ s, y, rho: 1 / sy, gamma: sy / yy });
    if (this.#pairs.length > this.#history) this.#pairs.shift();
  }

  /**
   * Returns d: the two-loop recursion, Nocedal and Wright, algorithm 7.4.
   *
   * @param {Float32Array} g
   */
  #direction(g) {
    const d = g.slice();
    scale(d, -1);
    const newest = this.#pairs.at(-1);
    if (!newest) return d;
    const alphas = this.#pairs.map(() => 0);
    for (let i = this.#pairs.length - 1; i >= 0; i--) {
      const { s, y, rho } = this.#pairs[i];
      alphas[i] = rho * dot(s, d);
      add(d, -alphas[i], y);
    }
    scale(d, newest.gamma);
    this.#pairs.forEach(({ s, y, rho }, i) => add(d, alphas[i] - rho * dot(y, d), s));
    return d;
  }
}

/**
 * @param {Float32Array} a
 * @param {Float32Array} b
 */
function dot(a, b) {
  let total = 0;
  for (let i = 0; i < a.length; i++) total += a[i] * b[i];
  return total;
}

/**
 * @param {Float32Array} a
 * @param {number} factor
 */
function scale(a, factor) {
  for (let i = 0; i < a.length; i++) a[i] *= factor;
}

/**
 * Adds `factor` times `b` to `a`.
 *
 * @param {Float32Array} a
 * @param {number} factor
 * @param {Float32Array} b
 */
function add(a, factor, b) {
  for (let i = 0; i < a.length; i++) a[i] += factor * b[i];
}

/**
 * @param {Float32Array} a
 * @param {Float32Array} b
 */
function sum(a, b) {
  return a.map((value, i) => value + b[i]);
}

/**
 * @param {Float32Array} a
 * @param {Float32Array} b
 */
function difference(a, b) {
  return a.map((value, i) => value - b[i]);
}
