import { Client, credentials as channelCredentials, Metadata, status } from '@grpc/grpc-js';
import type { CallOptions as GrpcCallOptions, ChannelCredentials, ChannelOptions } from '@grpc/grpc-js';
import type { MethodDefinition } from '@grpc/proto-loader';
import { contract } from './contract.js';
import { asNstError, CancelledError, NstError } from './errors.js';
import type { StylizeEvent } from './events.js';
import type { StylizeRequest__Input as StylizeMessage } from './generated/nst/v1/StylizeRequest.js';
import { loadImage, loadStyles, type ImageSource, type StyleImageSource, type StyleSource } from './images.js';
import type { Encoding, Model, OptionDescription, Preset, Preview, Style, StylizeOptions } from './messages.js';
import { camelCase, fromPlain, toPlain } from './plain.js';
import { readEvents, Stylization } from './stylization.js';

type UnaryMethod<In, Out> = Pick<
  MethodDefinition<In, unknown, unknown, Out>,
  'path' | 'requestSerialize' | 'responseDeserialize'
>;

/** How to reach the server. */
export interface ClientOptions {
  /** Default: no encryption. */
  readonly credentials?: ChannelCredentials | undefined;
  /** Options of grpc-js. None is needed; gRPC's limits fit the service. */
  readonly channelOptions?: ChannelOptions | undefined;
}

/** When to give a call up. */
export interface CallOptions {
  /** Aborting it cancels the call, and the job with it. */
  readonly signal?: AbortSignal | undefined;
  /** Milliseconds until the call, and the job with it, is given up. Default: none. */
  readonly deadlineMs?: number | undefined;
}

/** What `stylize` needs. */
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
}

/** What `createStyle` needs. */
export interface CreateStyleRequest {
  /** 1 to 16 images, mixed by their weights. */
  readonly images: readonly StyleImageSource[];
  /** The last part of the style's name. Default: made from the content. */
  readonly id?: string | undefined;
  /** A name for people. */
  readonly displayName?: string | undefined;
}

/** How to list. */
export interface ListOptions extends CallOptions {
  /** How many to fetch at once. Default: the server's. */
  readonly pageSize?: number | undefined;
}

/** A client of one server. Its calls share one connection, which is made at the first call and again when it is lost. */
export class NstClient {
  readonly #address: string;
  readonly #client: Client;
  #closed = false;

  constructor(address = 'localhost:50051', { credentials, channelOptions = {} }: ClientOptions = {}) {
    this.#address = address;
    this.#client = new Client(address, credentials ?? channelCredentials.createInsecure(), channelOptions);
  }

  /** Makes a picture. The call begins when the returned object is looped over, or its `result()` is asked for. */
  stylize(request: StylizeRequest, options: CallOptions = {}): Stylization {
    return new Stylization((watched) => this.#stylize(request, watched, options));
  }

  /** Stores a style. The same images, weights and id give the same style again. */
  async createStyle({ images, id, displayName }: CreateStyleRequest, options?: CallOptions): Promise<Style> {
    const style = { displayName, images: await loadStyles(images, 'style.images') };
    const message = fromPlain(contract.CreateStyleRequest, { styleId: id, style });
    return toPlain(contract.Style, await this.#call(contract.StyleService.service.CreateStyle, message, options));
  }

  /** One stored style, by its name (`styles/…` or the bare id). */
  async getStyle(name: string, options?: CallOptions): Promise<Style> {
    const message = fromPlain(contract.GetStyleRequest, { name });
    return toPlain(contract.Style, await this.#call(contract.StyleService.service.GetStyle, message, options));
  }

  /** The stored styles in the order of their names, fetched page by page while you loop. */
  async *listStyles({ pageSize, ...options }: ListOptions = {}): AsyncGenerator<Style, void, undefined> {
    let pageToken = '';
    do {
      const message = fromPlain(contract.ListStylesRequest, { pageSize, pageToken });
      const page = await this.#call(contract.StyleService.service.ListStyles, message, options);
      for (const style of page.styles) yield toPlain(contract.Style, style);
      pageToken = page.nextPageToken;
    } while (pageToken);
  }

  /** Deletes a stored style. Jobs already accepted go on. */
  async deleteStyle(name: string, options?: CallOptions): Promise<void> {
    const message = fromPlain(contract.DeleteStyleRequest, { name });
    await this.#call(contract.StyleService.service.DeleteStyle, message, options);
  }

  /** The feature models that the server knows, the default one first. */
  async listModels(options?: CallOptions): Promise<Model[]> {
    const models: Model[] = [];
    let pageToken = '';
    do {
      const page = await this.#call(contract.ModelService.service.ListModels, { pageToken }, options);
      models.push(...page.models.map((model) => toPlain(contract.Model, model)));
      pageToken = page.nextPageToken;
    } while (pageToken);
    return models;
  }

  /** Every option of `stylize`: type, default, bounds, choices, meaning. For forms, sliders and command lines. */
  async describeOptions(options?: CallOptions): Promise<OptionDescription[]> {
    const reply = await this.#call(contract.StyleTransferService.service.DescribeOptions, {}, options);
    return reply.options.map((option) => {
      const key = camelCase(option.name) as OptionDescription['key'];
      return { ...toPlain(contract.OptionDescription, option), key };
    });
  }

  /** The presets that the server knows, each with all the options it stands for. */
  async describePresets(options?: CallOptions): Promise<Preset[]> {
    const reply = await this.#call(contract.StyleTransferService.service.DescribeOptions, {}, options);
    return reply.presets.map((preset) => {
      const { name, description, options: values = {} } = toPlain(contract.PresetDescription, preset);
      // A choice newer than this client could not be sent back.
      const known = Object.entries(values).filter(([, value]) => value !== 'unspecified');
      return { name, description, options: Object.fromEntries(known) };
    });
  }

  /** Closes the connection when its last call has ended. */
  close(): void {
    this.#closed = true;
    this.#client.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  async *#stylize(
    request: StylizeRequest,
    watched: boolean,
    { signal, deadlineMs }: CallOptions,
  ): AsyncGenerator<StylizeEvent, void, undefined> {
    const message = await stylizeMessage(request, watched);
    throwIfAborted(signal);
    const { path, requestSerialize, responseDeserialize } = contract.StyleTransferService.service.Stylize;
    const call = this.#open().makeServerStreamRequest(
      path,
      requestSerialize,
      responseDeserialize,
      message,
      new Metadata(),
      withDeadline(deadlineMs),
    );
    const abort = () => call.cancel();
    signal?.addEventListener('abort', abort, { once: true });
    try {
      for await (const event of readEvents(call)) {
        throwIfAborted(signal);
        yield event;
      }
    } catch (error) {
      throw asNstError(error, this.#address, signal);
    } finally {
      signal?.removeEventListener('abort', abort);
      call.cancel();
    }
  }

  #open(): Client {
    if (this.#closed) throw new NstError('the client was closed', { code: status.FAILED_PRECONDITION });
    return this.#client;
  }

  #call<In, Out>(
    { path, requestSerialize, responseDeserialize }: UnaryMethod<In, Out>,
    message: In,
    { signal, deadlineMs }: CallOptions = {},
  ): Promise<Out> {
    return new Promise<Out>((resolve, reject) => {
      throwIfAborted(signal);
      const call = this.#open().makeUnaryRequest(
        path,
        requestSerialize,
        responseDeserialize,
        message,
        new Metadata(),
        withDeadline(deadlineMs),
        (error, reply) => {
          signal?.removeEventListener('abort', abort);
          if (error) reject(asNstError(error, this.#address, signal));
          else resolve(reply!);
        },
      );
      const abort = () => call.cancel();
      signal?.addEventListener('abort', abort, { once: true });
    });
  }
}

async function stylizeMessage(request: StylizeRequest, watched: boolean): Promise<StylizeMessage> {
  const [content, styles, initImage] = await Promise.all([
    loadImage(request.content, 'content'),
    loadStyles(request.styles, 'styles'),
    request.initImage === undefined ? undefined : loadImage(request.initImage, 'init_image'),
  ]);
  const preview = request.preview ?? (watched ? undefined : { interval: 0 });
  return fromPlain(contract.StylizeRequest, { ...request, content, styles, initImage, preview });
}

function withDeadline(deadlineMs: number | undefined): GrpcCallOptions {
  return deadlineMs === undefined ? {} : { deadline: Date.now() + deadlineMs };
}

function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted) throw new CancelledError('the call was aborted', { cause: signal.reason });
}
