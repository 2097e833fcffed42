// Files larger than one message, up and down, in parts: an interruption costs no more than the part under way.
import { createHash } from 'node:crypto';
import { status } from '@grpc/grpc-js';
import type { Connection, Method } from './connection.js';
import { contract } from './contract.js';
import { BrokenStreamError, NotFoundError, ServerError, UnavailableError } from './errors.js';
import type { FilePart } from './generated/nst/v1/FilePart.js';
import type { Upload } from './generated/nst/v1/Upload.js';
import { ImageAssembler, type EncodedImage } from './image_parts.js';

/** A file that the server made, complete and checked against its SHA-256. */
export interface ExportedFile {
  /** The file's bytes. */
  readonly data: Buffer;
  /** What the server would call it, `vgg16-hed-closure.onnx` for instance. */
  readonly name: string;
  /** SHA-256 of `data`, 64 lowercase hexadecimal digits. */
  readonly sha256: string;
}

/** Is told of the bytes that are here, and how many there will be; undefined while the server is making the file. */
export type OnProgress = (receivedBytes: number, totalBytes: number | undefined) => void;

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

/** Downloads a file that the server makes. Raises BrokenStreamError if it is not the one that was announced. */
export async function downloadFile<In extends object>(
  connection: Connection,
  method: Method<In & { offset: number; sha256: string }, FilePart>,
  request: In,
  signal: AbortSignal,
  onProgress?: OnProgress,
): Promise<ExportedFile> {
  const patience = connection.patience();
  let chunks: Buffer[] = [];
  let received = 0;
  let announced: FilePart | undefined;
  for (;;) {
    try {
      const missing = { ...request, offset: received, sha256: announced?.sha256 ?? '' };
      for await (const part of connection.stream(method, missing, signal)) {
        patience.renew();
        if (part.totalBytes > 0) {
          // After an interruption there may be another server, which makes another file and begins with its start.
          if (part.offset === 0 && part.sha256 !== announced?.sha256) [chunks, received, announced] = [[], 0, part];
          if (part.offset !== received || part.sha256 !== announced?.sha256) {
            throw new BrokenStreamError(`a file has a part at ${part.offset} where ${received} was due`);
          }
          chunks.push(part.data);
          received += part.data.length;
        }
        onProgress?.(received, announced?.totalBytes);
      }
      return wholeFile(Buffer.concat(chunks, received), announced);
    } catch (error) {
      await patience.wait(error, signal);
    }
  }
}

function wholeFile(data: Buffer, announced: FilePart | undefined): ExportedFile {
  if (!announced) throw new BrokenStreamError('a file came without its data');
  const { fileName: name, sha256, totalBytes } = announced;
  if (data.length !== totalBytes) throw new BrokenStreamError(`${name} has ${data.length} bytes, not ${totalBytes}`);
  const found = createHash('sha256').update(data).digest('hex');
  if (found !== sha256) throw new BrokenStreamError(`${name} has the SHA-256 ${found}, not ${sha256}`);
  return { data, name, sha256 };
}
