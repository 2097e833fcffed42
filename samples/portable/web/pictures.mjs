/**
 * Pictures as the graphs take them: RGB in [0, 1], three planes one after the other, row by row.
 *
 * @typedef {object} Picture
 * @property {number} width pixels
 * @property {number} height pixels
 * @property {Float32Array} data 3 × height × width
 */

/**
 * Returns the picture of 8-bit pixels, leaving out their alpha.
 *
 * @param {Uint8Array | Uint8ClampedArray} pixels row by row, `channels` bytes each
 * @param {number} width
 * @param {number} height
 * @param {3 | 4} channels
 * @returns {Picture}
 */
export function fromPixels(pixels, width, height, channels) {
  const area = width * height;
  const data = new Float32Array(3 * area);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) data[c * area + i] = pixels[channels * i + c] / 255;
  }
  return { width, height, data };
}

/**
 * Returns the pixels of a picture, clipped to [0, 1]: four bytes each, opaque.
 *
 * @param {Picture} picture
 */
export function toPixels({ width, height, data }) {
  const area = width * height;
  const pixels = new Uint8ClampedArray(4 * area);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) pixels[4 * i + c] = 255 * data[c * area + i];
    pixels[4 * i + 3] = 255;
  }
  return pixels;
}

/** Smallest edge whose deepest features still have a position, pixels. */
const MIN_EDGE = 16;

/**
 * Returns width and height of a picture whose longer edge is `edge`, in the proportions given.
 *
 * @param {number} width
 * @param {number} height
 * @param {number} edge pixels
 */
export function fitted(width, height, edge) {
  const factor = edge / Math.max(width, height);
  const scaled = (/** @type {number} */ length) => Math.max(MIN_EDGE, Math.round(length * factor));
  return { width: scaled(width), height: scaled(height) };
}

/**
 * Returns a picture continued by its mirror image on each side; the edge itself is not repeated. At the edge of what a
 * convolutional network sees its features mean something else: what happens there is cut off again by `trimmed`.
 *
 * @param {Picture} picture
 * @param {number} margin pixels
 */
export function mirrored({ width, height, data }, margin) {
  const inside = (/** @type {number} */ place, /** @type {number} */ length) => {
    const period = 2 * length - 2;
    const there = (((place - margin) % period) + period) % period;
    return Math.min(there, period - there);
  };
  return gathered(data, width, height, width + 2 * margin, height + 2 * margin, inside);
}

/**
 * Returns a picture without its margin.
 *
 * @param {Picture} picture
 * @param {number} margin pixels
 */
export function trimmed({ width, height, data }, margin) {
  return gathered(data, width, height, width - 2 * margin, height - 2 * margin, (place) => place + margin);
}

/**
 * Returns a picture at a larger size, with bilinear interpolation.
 *
 * @param {Picture} picture
 * @param {number} width
 * @param {number} height
 * @returns {Picture}
 */
export function enlarged(picture, width, height) {
  const columns = interpolation(picture.width, width);
  const rows = interpolation(picture.height, height);
  const data = new Float32Array(3 * width * height);
  for (let c = 0, i = 0; c < 3; c++) {
    const plane = picture.data.subarray(c * picture.width * picture.height);
    for (const { first: top, second: bottom, part: down } of rows) {
      for (const { first: left, second: right, part: across } of columns) {
        const above = plane[top * picture.width + left] * (1 - across) + plane[top * picture.width + right] * across;
        const below =
          plane[bottom * picture.width + left] * (1 - across) + plane[bottom * picture.width + right] * across;
        data[i++] = above * (1 - down) + below * down;
      }
    }
  }
  return { width, height, data };
}

/**
 * Returns for each of `to` places between which two of `from` it lies, and how far from the first.
 *
 * @param {number} from
 * @param {number} to
 */
function interpolation(from, to) {
  return Array.from({ length: to }, (_, i) => {
    const place = Math.min(Math.max(((i + 0.5) * from) / to - 0.5, 0), from - 1);
    const first = Math.floor(place);
    return { first, second: Math.min(first + 1, from - 1), part: place - first };
  });
}

/**
 * Returns the picture whose pixels are those of another at the places that `from` names.
 *
 * @param {Float32Array} data
 * @param {number} oldWidth
 * @param {number} oldHeight
 * @param {number} width
 * @param {number} height
 * @param {(place: number, length: number) => number} from
 * @returns {Picture}
 */
function gathered(data, oldWidth, oldHeight, width, height, from) {
  const columns = Array.from({ length: width }, (_, x) => from(x, oldWidth));
  const rows = Array.from({ length: height }, (_, y) => from(y, oldHeight));
  const gathered = new Float32Array(3 * width * height);
  let i = 0;
  for (let c = 0; c < 3; c++) {
    for (const row of rows) {
      const start = (c * oldHeight + row) * oldWidth;
      for (const column of columns) gathered[i++] = data[start + column];
    }
  }
  return { width, height, data: gathered };
}
