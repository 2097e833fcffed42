// Image files with a text in their EXIF field ImageDescription, byte by byte.

/** The EXIF block, which is also a TIFF file: another field first, then the text. */
function block(text: string, byteOrder: 'II' | 'MM'): Buffer {
  const value = Buffer.from(`${text}\0`, 'latin1');
  const little = byteOrder === 'II';
  const short = (number: number) => Buffer.from(little ? [number & 255, number >> 8] : [number >> 8, number & 255]);
  const long = (number: number) => {
    const bytes = Buffer.alloc(4);
    if (little) bytes.writeUInt32LE(number);
    else bytes.writeUInt32BE(number);
    return bytes;
  };
  const orientation = [short(0x0112), short(3), long(1), short(1), short(0)];
  const description = [short(0x010e), short(2), long(value.length), value.length > 4 ? long(38) : value];
  const directory = [short(2), ...orientation, ...description];
  return Buffer.concat([Buffer.from(byteOrder), short(42), long(8), ...directory, Buffer.alloc(4), value]);
}

function riffChunk(name: string, data: Buffer): Buffer {
  const length = Buffer.alloc(4);
  length.writeUInt32LE(data.length);
  return Buffer.concat([Buffer.from(name), length, data, Buffer.alloc(data.length % 2)]);
}

function pngChunk(name: string, data: Buffer): Buffer {
  const length = Buffer.alloc(4);
  length.writeUInt32BE(data.length);
  return Buffer.concat([length, Buffer.from(name), data, Buffer.alloc(4)]);
}

function jpegSegment(kind: number, data: Buffer): Buffer {
  const length = Buffer.alloc(2);
  length.writeUInt16BE(data.length + 2);
  return Buffer.concat([Buffer.from([0xff, kind]), length, data]);
}

const PREFIX = Buffer.from('Exif\0\0');

/** One file of each format, without pixels. */
export function described(text: string): Record<string, Buffer> {
  const exif = block(text, 'II');
  const png = [Buffer.from('\x89PNG\r\n\x1a\n', 'latin1'), pngChunk('IHDR', Buffer.alloc(13)), pngChunk('eXIf', exif)];
  const jpeg = [
    Buffer.from([0xff, 0xd8]),
    jpegSegment(0xe0, Buffer.from('JFIF\0')),
    jpegSegment(0xe1, Buffer.from('http://ns.adobe.com/xap/1.0/\0')),
    jpegSegment(0xe1, Buffer.concat([PREFIX, exif])),
    jpegSegment(0xda, Buffer.alloc(3)),
  ];
  const webp = (data: Buffer) =>
    riffChunk(
      'RIFF',
      Buffer.concat([Buffer.from('WEBP'), riffChunk('VP8 ', Buffer.alloc(5)), riffChunk('EXIF', data)]),
    );
  return {
    png: Buffer.concat(png),
    jpeg: Buffer.concat(jpeg),
    webp: webp(exif),
    "webp with JPEG's prefix": webp(Buffer.concat([PREFIX, exif])),
    tiff: exif,
    'tiff, big-endian': block(text, 'MM'),
  };
}

/** The parameters that a result carries. */
export const recorded = {
  nst: '0.1.0',
  model: 'vgg16-hed',
  model_sha256: 'aa',
  options: {
    size_px: 64,
    init: 'noise',
    style_layers: { relu1_1: 2, relu2_1: 1 },
    scale_iterations: [9, 5],
    deterministic: true,
  },
  content_sha256: 'bb',
  styles: [
    { sha256: ['11', '22'], weight: 2, name: 'styles/sea' },
    { sha256: ['33'], weight: 1, region_sha256: '44', style_region_sha256: '55' },
  ],
  init_image_sha256: '66',
  loss: 0.5,
  iteration: 7,
  stop_reason: 'iterations',
};
