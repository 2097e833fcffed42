// What a job is asked for with.
import type { Connection } from './connection.js';
import { contract } from './contract.js';
import type { StylizeRequest__Input as StylizeMessage } from './generated/nst/v1/StylizeRequest.js';
import { loadImage, loadStyles, type ImageSource, type StyleSource } from './images.js';
import type { Encoding, Preview, StylizeOptions } from './messages.js';
import { fromPlain } from './plain.js';
import { upload } from './transfers.js';

/** What `stylize` and `createJob` need. */
export interface StylizeRequest {
  /** The photograph whose content the picture keeps. */
  readonly content: ImageSource;
  /** 1 to 16 styles, mixed by their weights. A string is a file; a stored style is `{ style: 'styles/…' }`. */
  readonly styles: readonly StyleSource[];
  /** Name of the feature model, `models/…` or the bare id. Default: the server's. */
  readonly model?: string | undefined;
  /** What is left out has the server's default: see `describeOptions`. */
  readonly options?: StylizeOptions | undefined;
  /** Which pictures on the way to send. Default: each iteration's, at most 512 px, as JPEG. */
  readonly preview?: Preview | undefined;
  /** The picture to start from, another run's result for instance; implies `init: 'image'`. */
  readonly initImage?: ImageSource | undefined;
  /** How to encode the result. Default: PNG. */
  readonly output?: Encoding | undefined;
  /**
   * A name for the request, so that sent again it makes no second job: at most 64 of A–Z, a–z, 0–9, `-`, `_` and `.`.
   * Default: a new UUID.
   */
  readonly requestId?: string | undefined;
}

/** Image bytes in one request; servers take messages of 32 MiB unless they are set otherwise. */
const INLINE_BYTES = 24 << 20;

/** The message of a request; images that are too large for one are on the server then. */
export async function stylizeMessage(
  connection: Connection,
  request: StylizeRequest & { readonly cancelOnDisconnect?: boolean },
  signal: AbortSignal,
): Promise<StylizeMessage> {
  const [content, styles, initImage] = await Promise.all([
    loadImage(request.content, 'content'),
    loadStyles(request.styles, 'styles'),
    request.initImage === undefined ? undefined : loadImage(request.initImage, 'init_image'),
  ]);
  const message: StylizeMessage = fromPlain(contract.StylizeRequest, { ...request, content, styles, initImage });
  const inputs = (message.styles ?? []).flatMap(({ image, region, styleRegion }) => [image, region, styleRegion]);
  const brought = [message.content, message.initImage, ...inputs].filter((image) => image?.data !== undefined);
  const files = brought.map((image) => image!.data as Uint8Array);
  if (files.reduce((sum, { length }) => sum + length, 0) > INLINE_BYTES) {
    for (const [index, file] of files.entries()) {
      brought[index]!.name = await upload(connection, file, signal);
      delete brought[index]!.data;
    }
  }
  signal.throwIfAborted();
  return message;
}
