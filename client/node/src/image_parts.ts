// Pictures larger than one message arrive in parts; here they become whole again.
import { createHash, type Hash } from 'node:crypto';
import { contract } from './contract.js';
import { BrokenStreamError } from './errors.js';
import type { ImagePart } from './generated/nst/v1/ImagePart.js';
import type { ImageFormat } from './messages.js';
import { toPlain } from './plain.js';

/** An image file in memory, complete and checked against its SHA-256. */
export interface EncodedImage {
  /** The file's bytes. */
  readonly data: Buffer;
  readonly format: ImageFormat;
  /** Pixels. */
  readonly width: number;
  /** Pixels. */
  readonly height: number;
  /** SHA-256 of `data`, 64 lowercase hexadecimal digits. */
  readonly sha256: string;
}

interface Incomplete {
  readonly first: ImagePart;
  readonly chunks: Buffer[];
  readonly hash: Hash;
  received: number;
}

/** Puts the parts of one kind of picture together. */
export class ImageAssembler {
  #incomplete: Incomplete | undefined;

  constructor(private readonly kind: string) {}

  /** The image that `part` completes, or undefined; raises BrokenStreamError if the parts do not fit. */
  add(part: ImagePart): EncodedImage | undefined {
    const image = (this.#incomplete ??= { first: part, chunks: [], hash: createHash('sha256'), received: 0 });
    this.#check(part, image);
    image.chunks.push(part.data);
    image.hash.update(part.data);
    image.received += part.data.length;
    if (image.received < part.totalBytes) return undefined;

    this.#incomplete = undefined;
    const sha256 = image.hash.digest('hex');
    if (sha256 !== part.sha256) this.#fail(`has the SHA-256 ${sha256}, not ${part.sha256 || 'given'}`);
    const { width, height } = part;
    const { format } = toPlain(contract.ImagePart, part);
    // One part is used as it came, without a copy.
    const data = image.chunks.length === 1 ? part.data : Buffer.concat(image.chunks, image.received);
    return { data, format, width, height, sha256 };
  }

  /** Raises BrokenStreamError if a picture is incomplete. */
  end(): void {
    if (!this.#incomplete) return;
    this.#fail(`ended after ${this.#incomplete.received} of ${this.#incomplete.first.totalBytes} bytes`);
  }

  #check(part: ImagePart, { first, received }: Incomplete): void {
    if (part.offset !== received) this.#fail(`has a part at ${part.offset} where ${received} was due`);
    for (const field of ['totalBytes', 'format', 'width', 'height'] as const) {
      if (part[field] !== first[field]) this.#fail(`has parts of different ${field}`);
    }
    if (part.data.length === 0) this.#fail('has an empty part');
    if (received + part.data.length > part.totalBytes) this.#fail(`is longer than its ${part.totalBytes} bytes`);
  }

  #fail(what: string): never {
    throw new BrokenStreamError(`a ${this.kind}'s picture ${what}`);
  }
}
