// The EXIF field ImageDescription of an image file, in plain JavaScript.

const DESCRIPTION = 0x010e;
const ASCII = 2;
const EXIF = 'Exif\0\0';

/**
 * The text of the field; undefined if the file has none. Raises an Error if the file is not PNG, JPEG, WebP or TIFF,
 * and a RangeError if it ends early.
 */
export function imageDescription(file: Buffer): string | undefined {
  const block = exifBlock(file);
  return block && descriptionIn(block);
}

/** EXIF is a small TIFF file: here it is cut out of the others. */
function exifBlock(file: Buffer): Buffer | undefined {
  if (isAt(file, 0, '\x89PNG\r\n\x1a\n')) return inPng(file);
  if (isAt(file, 0, '\xff\xd8\xff')) return inJpeg(file);
  if (isAt(file, 0, 'RIFF') && isAt(file, 8, 'WEBP')) return inWebp(file);
  if (isAt(file, 0, 'II*\0') || isAt(file, 0, 'MM\0*')) return file;
  throw new Error('it is not PNG, JPEG, WebP or TIFF');
}

function inPng(file: Buffer): Buffer | undefined {
  // Each chunk: the length of its data, its name, the data, a checksum.
  for (let at = 8; at < file.length; at += 12 + file.readUInt32BE(at)) {
    if (isAt(file, at + 4, 'eXIf')) return file.subarray(at + 8, at + 8 + file.readUInt32BE(at));
  }
  return undefined;
}

function inJpeg(file: Buffer): Buffer | undefined {
  // Each segment: 0xff, its kind, its length with these two bytes, the data. 0xda begins the pixels.
  for (let at = 2; file.readUInt8(at + 1) !== 0xda; at += 2 + file.readUInt16BE(at + 2)) {
    if (isAt(file, at, '\xff\xe1') && isAt(file, at + 4, EXIF)) {
      return file.subarray(at + 4 + EXIF.length, at + 2 + file.readUInt16BE(at + 2));
    }
  }
  return undefined;
}

function inWebp(file: Buffer): Buffer | undefined {
  // Each chunk: its name, the length of its data, the data, a byte more if the length is odd.
  for (let at = 12; at < file.length; at += 8 + 2 * Math.ceil(file.readUInt32LE(at + 4) / 2)) {
    if (!isAt(file, at, 'EXIF')) continue;
    // Some programs write JPEG's prefix here too.
    const start = at + 8 + (isAt(file, at + 8, EXIF) ? EXIF.length : 0);
    return file.subarray(start, at + 8 + file.readUInt32LE(at + 4));
  }
  return undefined;
}

function descriptionIn(tiff: Buffer): string | undefined {
  const little = isAt(tiff, 0, 'II');
  const short = (at: number) => (little ? tiff.readUInt16LE(at) : tiff.readUInt16BE(at));
  const long = (at: number) => (little ? tiff.readUInt32LE(at) : tiff.readUInt32BE(at));
  const directory = long(4);
  for (let entry = 0; entry < short(directory); entry++) {
    // Each entry: tag, type, number of values, and the values if four bytes hold them, else where they are.
    const at = directory + 2 + 12 * entry;
    if (short(at) !== DESCRIPTION || short(at + 2) !== ASCII) continue;
    const length = long(at + 4);
    const start = length <= 4 ? at + 8 : long(at + 8);
    if (start + length > tiff.length) throw new RangeError('its description ends early');
    return tiff.toString('utf8', start, start + length).replace(/\0.*$/s, '');
  }
  return undefined;
}

function isAt(file: Buffer, at: number, text: string): boolean {
  return file.toString('latin1', at, at + text.length) === text;
}
