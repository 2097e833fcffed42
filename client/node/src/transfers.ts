// Images larger than one message, up and down, in parts: an interruption costs no more than the part under way.
import { createHash } from 'node:crypto';
import { status } from '@grpc/grpc-js';
import type { Connection } from './connection.js';
import { contract } from './contract.js';
import { BrokenStreamError, NotFoundError, ServerError, UnavailableError } from './errors.js';
import type { Upload } from './generated/nst/v1/Upload.js';
import { ImageAssembler, type EncodedImage } from './image_parts.js';

const PART_BYTES = 1 << 20;
const { service } = contract.ImageService;

/** Uploads an image file, but for what the server has of it; returns its name, `images/{sha256}`. */
export async function upload(connection: Connection, file: Uint8Array, signal: AbortSignal): Promise<string> {
  const sha256 = createHash('sha256').update(file).digest('hex');
  const whole = { totalBytes: file.length, sha256 };
  const patience = connection.patience();
  for (let begun: Upload | undefined; ;) {
    try {
      begun = begun
        ? await connection.unary(service.GetUpload, { name: begun.name }, signal)
        : await connection.unary(service.CreateUpload, whole, signal);
      while (!begun.image) {
        // Where all parts have come and the whole was not made of them, the last byte once more makes the server do it.
        const offset = Math.min(begun.receivedBytes, file.length - 1);
        const data = file.subarray(offset, offset + PART_BYTES);
        begun = await connection.unary(service.WriteUpload, { name: begun.name, offset, data }, signal);
        patience.renew();
      }
      return begun.image;
    } catch (error) {
      // It was completed and only the answer was lost, or it has lain there for too long.
      const gone = error instanceof NotFoundError && begun !== undefined;
      const misplaced = error instanceof ServerError && error.code === status.OUT_OF_RANGE;
      await patience.wait(error, signal, gone || misplaced || error instanceof UnavailableError);
      if (gone) begun = undefined;
    }
  }
}

/** Downloads an image, `images/{sha256}`. Raises BrokenStreamError if it is not the one of that name. */
export async function download(connection: Connection, name: string, signal: AbortSignal): Promise<EncodedImage> {
  const assembler = new ImageAssembler('download');
  const patience = connection.patience();
  for (let offset = 0; ;) {
    try {
      for await (const part of connection.stream(service.DownloadImage, { name, offset }, signal)) {
        const image = assembler.add(part);
        offset += part.data.length;
        patience.renew();
        if (image) return checked(image, name);
      }
      assembler.end();
      throw new BrokenStreamError(`${name} came without its data`);
    } catch (error) {
      await patience.wait(error, signal);
    }
  }
}

function checked(image: EncodedImage, name: string): EncodedImage {
  if (image.sha256 === name.replace(/^images\//, '')) return image;
  throw new BrokenStreamError(`${name} arrived as a file with the SHA-256 ${image.sha256}`);
}
