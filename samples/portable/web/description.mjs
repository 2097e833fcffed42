/**
 * What an exported ONNX file says of itself, read from its bytes, without any runtime.
 *
 * An ONNX file is one protobuf message, `ModelProto`. The description, JSON, is the last of its `metadata_props` (field 14;
 * the key is field 1, the value field 2), and the last thing in the file. Its `content_sha256` is that of all bytes before
 * and of the description, with 64 zeros in place of the digest itself; before each stands its length in 8 bytes.
 */

const METADATA_PROPS = 14;
const KEY = 'nst.json';
const FORMAT_VERSION = 1;
const SEAL = /(?<="content_sha256":")[0-9a-f]{64}(?=")/;

/** A file that cannot be used, and why: the message is for whoever chose it. */
export class InvalidArtifact extends Error {
  name = 'InvalidArtifact';

  /**
   * @param {string} file name
   * @param {string} reason what follows the name in a sentence
   */
  constructor(file, reason) {
    super(`${file} ${reason}`);
  }
}

/**
 * Returns the description of an exported ONNX file. Throws InvalidArtifact for one that is none, or truncated, altered or
 * of another version.
 *
 * @param {Uint8Array<ArrayBuffer>} bytes the file
 * @param {string} name for messages
 * @returns {Promise<Record<string, any>>}
 */
export async function readDescription(bytes, name) {
  const found = lastProperty(bytes, name);
  const sealed = found && new TextDecoder().decode(found.value);
  const seal = sealed?.match(SEAL)?.[0];
  if (!found || !sealed || !seal) {
    throw new InvalidArtifact(name, 'is not one of the graphs that this project exports: it carries no description.');
  }
  const description = JSON.parse(sealed);
  if (description.format_version !== FORMAT_VERSION) {
    const version = description.format_version;
    throw new InvalidArtifact(name, `has format version ${version}; this page reads version ${FORMAT_VERSION}.`);
  }
  const unsealed = new TextEncoder().encode(sealed.replace(SEAL, '0'.repeat(64)));
  if ((await sha256([bytes.subarray(0, found.start), unsealed])) !== seal) {
    throw new InvalidArtifact(name, 'was altered or damaged since it was exported: its SHA-256 is another.');
  }
  return description;
}

/**
 * Returns the digest of pieces, each after its length, in hexadecimal digits.
 *
 * @param {Uint8Array[]} pieces
 */
async function sha256(pieces) {
  const whole = new Uint8Array(pieces.reduce((total, piece) => total + 8 + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    new DataView(whole.buffer).setBigUint64(at, BigInt(piece.length), true);
    whole.set(piece, at + 8);
    at += 8 + piece.length;
  }
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', whole));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, '0')).join('');
}

/**
 * Returns the value of the last property, if that is the description, and where its field starts.
 *
 * @param {Uint8Array} bytes
 * @param {string} name
 */
function lastProperty(bytes, name) {
  const last = [...fields(bytes, name)].at(-1);
  if (last?.number !== METADATA_PROPS) return null;
  const property = new Map([...fields(last.content, name)].map(({ number, content }) => [number, content]));
  const value = property.get(2);
  return value && new TextDecoder().decode(property.get(1)) === KEY ? { start: last.start, value } : null;
}

/**
 * Yields the fields of a protobuf message: number, where it starts, and its bytes if it has a length.
 *
 * @param {Uint8Array} bytes
 * @param {string} name
 */
function* fields(bytes, name) {
  let at = 0;
  const broken = () => new InvalidArtifact(name, 'is not an ONNX file, or not all of one.');
  const varint = () => {
    let value = 0;
    for (let factor = 1; factor < 2 ** 70; factor *= 128) {
      const byte = bytes[at++]; // beyond the end it is undefined, which is less than nothing
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
    throw broken();
  };
  while (at < bytes.length) {
    const start = at;
    const tag = varint();
    const kind = tag % 8;
    const amount = varint(); // the value of kind 0, the length of kind 2
    if (kind !== 0 && kind !== 2) throw broken();
    const length = kind === 2 ? amount : 0;
    if (at + length > bytes.length) throw broken();
    yield { number: Math.floor(tag / 8), start, content: bytes.subarray(at, at + length) };
    at += length;
  }
}
