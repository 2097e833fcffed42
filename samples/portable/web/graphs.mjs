/**
 * The exported graphs that style transfer takes, in any onnxruntime for JavaScript: `features` for the content, `grams`
 * for the style, and `closure`, from the picture to the losses and their gradient.
 *
 * @import { InferenceSession, Tensor } from 'onnxruntime-common'
 * @import { Picture } from './pictures.mjs'
 */
import { InvalidArtifact, readDescription } from './description.mjs';
import { mirrored } from './pictures.mjs';

/**
 * @typedef {typeof import('onnxruntime-common')} Runtime onnxruntime-web or onnxruntime-node
 * @typedef {Record<string, Tensor>} Targets what pictures of one size are compared with, by the closure's input
 * @typedef {{ name: string, bytes: Uint8Array<ArrayBuffer>, description: Record<string, any> }} GraphFile
 */

/**
 * @typedef {object} Weights
 * @property {number} content
 * @property {number} style
 * @property {number} variation of the total variation
 * @property {Record<string, number>} [layers] relative weights of the layers; 1 for those that are not named
 */

/**
 * @typedef {object} Evaluation
 * @property {number} total
 * @property {Float32Array} content the loss of each content layer, before its weight
 * @property {Float32Array} style the loss of each style layer, before its weight
 * @property {number} variation before its weight
 * @property {Float32Array} gradient of the total to the picture, 3 × height × width
 */

export const GRAPHS = ['features', 'grams', 'closure'];

/** What all three must have been exported with alike. */
const COMMON = ['model', 'weights_sha256', 'pooling', 'padding'];

/**
 * Returns the files of the three graphs, given in any order, by graph. Throws InvalidArtifact for a file that is none of
 * them, one that is missing, and one that does not go with the others.
 *
 * @param {{ name: string, bytes: Uint8Array<ArrayBuffer> }[]} files
 */
export async function graphFiles(files) {
  /** @type {Map<string, GraphFile>} */
  const found = new Map();
  for (const { name, bytes } of files) {
    const description = await readDescription(bytes, name);
    if (!GRAPHS.includes(description.graph)) {
      throw new InvalidArtifact(name, `is the graph ${description.graph}; what is needed is ${GRAPHS.join(', ')}.`);
    }
    found.set(description.graph, { name, bytes, description });
  }
  const missing = GRAPHS.filter((graph) => !found.has(graph));
  if (missing.length > 0)
    throw new InvalidArtifact('A model', `has three graphs, ${GRAPHS.join(', ')}; missing: ${missing.join(', ')}.`);
  const [first, ...others] = found.values();
  for (const { name, description } of others) {
    const key = COMMON.find((key) => description[key] !== first.description[key]);
    if (key) {
      const [here, there] = [description[key], first.description[key]];
      throw new InvalidArtifact(name, `does not go with ${first.name}: its ${key} is ${here}, not ${there}.`);
    }
  }
  return found;
}

export class Graphs {
  #ort;
  #files;
  #options;
  /** @type {InferenceSession | null} */
  #closure = null;

  /**
   * @param {Runtime} ort the runtime
   * @param {Map<string, GraphFile>} files by graph: see `graphFiles`
   * @param {InferenceSession.SessionOptions} [options] execution providers, for instance
   */
  constructor(ort, files, options = {}) {
    this.#ort = ort;
    this.#files = files;
    this.#options = options;
  }

  /** What the closure says of itself. */
  get description() {
    return this.#file('closure').description;
  }

  /** How many pixels of its mirror image continue a picture on each side, before it goes in. */
  get margin() {
    return /** @type {number} */ (this.description.margin_px);
  }

  /**
   * Returns what pictures are compared with at each scale. Both pictures of a scale are without margin.
   *
   * @param {{ content: Picture, style: Picture }[]} scales
   * @returns {Promise<Targets[]>}
   */
  async targets(scales) {
    // One graph after the other: none stays in memory beside the next.
    const contents = await this.#each(
      'features',
      scales.map(({ content }) => content),
    );
    const styles = await this.#each(
      'grams',
      scales.map(({ style }) => style),
    );
    const { inputNames } = await this.#opened();
    return scales.map((_, scale) => {
      /** @type {Targets} */
      const targets = {};
      for (const input of inputNames) {
        const [role, layer] = input.split('.');
        if (role === 'content') targets[input] = this.#wanted('features', contents[scale], layer);
        if (role === 'style') targets[input] = this.#gram(this.#wanted('grams', styles[scale], `${layer}.gram`));
      }
      return targets;
    });
  }

  /**
   * Evaluates the closure.
   *
   * @param {Picture} picture with its margin
   * @param {Targets} targets
   * @param {Weights} weights
   * @returns {Promise<Evaluation>}
   */
  async evaluate(picture, targets, weights) {
    const session = await this.#opened();
    const vector = (/** @type {number[]} */ values) =>
      new this.#ort.Tensor('float32', Float32Array.from(values), [values.length]);
    const outputs = await session.run({
      ...targets,
      image: this.#tensor(picture),
      content_weights: vector(shares(session.inputNames, 'content', weights)),
      style_weights: vector(shares(session.inputNames, 'style', weights)),
      tv_weight: new this.#ort.Tensor('float32', Float32Array.of(weights.variation), []),
    });
    const numbers = (/** @type {string} */ name) => /** @type {Float32Array} */ (outputs[name].data);
    return {
      total: numbers('total')[0],
      content: numbers('content'),
      style: numbers('style'),
      variation: numbers('variation')[0],
      gradient: numbers('gradient'),
    };
  }

  /** Gives the memory back. */
  async close() {
    await this.#closure?.release();
    this.#closure = null;
  }

  async #opened() {
    this.#closure ??= await this.#open('closure');
    return this.#closure;
  }

  /**
   * Runs one graph on each picture.
   *
   * @param {string} graph
   * @param {Picture[]} pictures
   */
  async #each(graph, pictures) {
    const session = await this.#open(graph);
    const outputs = [];
    for (const picture of pictures)
      outputs.push(await session.run({ image: this.#tensor(mirrored(picture, this.margin)) }));
    await session.release();
    return outputs;
  }

  /** @param {string} graph */
  #open(graph) {
    return this.#ort.InferenceSession.create(this.#file(graph).bytes, this.#options);
  }

  /** @param {string} graph */
  #file(graph) {
    return /** @type {GraphFile} */ (this.#files.get(graph));
  }

  /**
   * @param {string} graph
   * @param {InferenceSession.OnnxValueMapType} outputs
   * @param {string} name
   */
  #wanted(graph, outputs, name) {
    const tensor = /** @type {Tensor | undefined} */ (outputs[name]);
    if (!tensor) {
      const [here, closure] = [this.#file(graph).name, this.#file('closure').name];
      throw new InvalidArtifact(
        here,
        `has no ${name}, which ${closure} asks for; it has ${Object.keys(outputs).join(', ')}.`,
      );
    }
    return tensor;
  }

  /**
   * Returns the Gram matrix (C, C) of a batch of one, (1, C, C).
   *
   * @param {Tensor} gram
   */
  #gram(gram) {
    return gram.reshape(gram.dims.slice(1));
  }

  /** @param {Picture} picture */
  #tensor({ width, height, data }) {
    return new this.#ort.Tensor('float32', data, [1, 3, height, width]);
  }
}

/**
 * Returns the weights of one role's layers, in the order of the closure's inputs: they sum to the role's weight.
 *
 * @param {readonly string[]} inputNames
 * @param {'content' | 'style'} role
 * @param {Weights} weights
 */
function shares(inputNames, role, weights) {
  const layers = inputNames.filter((name) => name.startsWith(`${role}.`)).map((name) => name.slice(role.length + 1));
  const relative = layers.map((layer) => weights.layers?.[layer] ?? 1);
  const sum = relative.reduce((total, weight) => total + weight, 0);
  return relative.map((weight) => (weights[role] * weight) / sum);
}
