import assert from 'node:assert/strict';
import { test } from 'node:test';
import { InvalidArtifact, readDescription } from '../description.mjs';
import { graphFiles } from '../graphs.mjs';
import { fileOf, modelFiles, modelPath, picturePath } from './inputs.mjs';

const closure = await fileOf(modelPath('closure'));

/**
 * @param {Promise<unknown>} reading
 * @param {RegExp} message
 */
const refused = (reading, message) =>
  assert.rejects(reading, (error) => error instanceof InvalidArtifact && message.test(error.message));

test('an exported file says what it is', async () => {
  const description = await readDescription(closure.bytes, closure.name);
  assert.equal(description.graph, 'closure');
  assert.equal(description.model, 'vgg16-hed');
  assert.equal(description.margin_px, 16);
});

test('a file that is no ONNX, or no graph of ours, is named', async () => {
  const photo = await fileOf(picturePath('photo'));
  await refused(readDescription(photo.bytes, photo.name), /^photo\.png is not an ONNX file/);
  await refused(readDescription(new Uint8Array(), 'empty.onnx'), /^empty\.onnx is not one of the graphs/);
  const foreign = Uint8Array.of(8, 9, 18, 2, 104, 105); // ir_version 9, producer_name "hi"
  await refused(readDescription(foreign, 'foreign.onnx'), /^foreign\.onnx is not one of the graphs/);
});

test('a file that lost its end, or a bit, is named', async () => {
  const half = closure.bytes.slice(0, closure.bytes.length / 2);
  await refused(readDescription(half, 'half.onnx'), /^half\.onnx is not an ONNX file, or not all of one/);
  const altered = closure.bytes.slice();
  altered[altered.length >> 1] ^= 1;
  await refused(readDescription(altered, 'altered.onnx'), /^altered\.onnx was altered or damaged/);
});

test('a file of another version is named', async () => {
  const bytes = await sealed({ format_version: 2, graph: 'closure' });
  await refused(readDescription(bytes, 'new.onnx'), /^new\.onnx has format version 2; this page reads version 1/);
});

test('a graph that is missing, another one, and one that does not belong to the rest is named', async () => {
  const files = await modelFiles();
  await refused(graphFiles(files.slice(0, 2)), /missing: closure/);
  await refused(graphFiles([]), /missing: features, grams, closure/);
  const description = await readDescription(closure.bytes, closure.name);
  const objective = { name: 'objective.onnx', bytes: await sealed({ ...description, graph: 'objective' }) };
  await refused(graphFiles([...files, objective]), /^objective\.onnx is the graph objective/);
  const other = { name: 'max.onnx', bytes: await sealed({ ...description, pooling: 'max' }) };
  await refused(
    graphFiles([...files.slice(0, 2), other]),
    /^max\.onnx does not go with .*: its pooling is max, not average/,
  );
});

/**
 * Returns a file that has a description and nothing else.
 *
 * @param {object} description
 */
async function sealed(description) {
  const text = JSON.stringify({ ...description, content_sha256: '0'.repeat(64) });
  const unsealed = new TextEncoder().encode(text);
  const hashed = new Uint8Array(16 + unsealed.length); // the length of nothing, then the description's
  new DataView(hashed.buffer).setBigUint64(8, BigInt(unsealed.length), true);
  hashed.set(unsealed, 16);
  const digest = Buffer.from(await crypto.subtle.digest('SHA-256', hashed)).toString('hex');
  const property = [
    ...field(1, new TextEncoder().encode('nst.json')),
    ...field(2, Buffer.from(text.replace(/0{64}/, digest))),
  ];
  return Uint8Array.from(field(14, property));
}

/**
 * @param {number} number
 * @param {ArrayLike<number> & Iterable<number>} content
 */
function field(number, content) {
  const length = [];
  for (let rest = content.length; ; rest >>= 7) {
    length.push(rest > 127 ? (rest & 127) | 128 : rest);
    if (rest < 128) return [number * 8 + 2, ...length, ...content];
  }
}
