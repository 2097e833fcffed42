import { randomUUID } from 'node:crypto';
import { Connection, limit, type CallOptions, type ClientOptions, type Method } from './connection.js';
import { contract } from './contract.js';
import { loadFile, loadStyles, type ImageFile, type StyleImageSource } from './images.js';
import type { EncodedImage } from './image_parts.js';
import type { Job, JobState, Model, OptionDescription, Preset, Preview, StoredImage, Style } from './messages.js';
import type { ModelExport, StyleExport, StylizeOptions } from './messages.js';
import { camelCase, fromPlain, toPlain } from './plain.js';
import { stylizeMessage, type StylizeRequest } from './requests.js';
import { Stylization } from './stylization.js';
import { download, downloadFile, upload, type ExportedFile, type OnProgress } from './transfers.js';

/** What `createStyle` needs. */
export interface CreateStyleRequest {
  /** 1 to 16 images, mixed by their weights. */
  readonly images: readonly StyleImageSource[];
  /** The last part of the style's name. Default: made from the content. */
  readonly id?: string | undefined;
  /** A name for people. */
  readonly displayName?: string | undefined;
}

/** How to keep an imported style. */
export interface ImportOptions extends CallOptions {
  /** The last part of the style's name. Default: made from the content. */
  readonly id?: string | undefined;
  /** A name for people. Default: the one in the file. */
  readonly displayName?: string | undefined;
}

/** How to fetch a file that the server makes. */
export interface ExportOptions extends CallOptions {
  /** Is told how far the file has come. */
  readonly onProgress?: OnProgress | undefined;
}

/** How to list. */
export interface ListOptions extends CallOptions {
  /** How many to fetch at once. Default: the server's. */
  readonly pageSize?: number | undefined;
}

/** Which jobs to list, and how. */
export interface ListJobsOptions extends ListOptions {
  /** Only jobs in one of these states. Default: all. */
  readonly states?: readonly Exclude<JobState, 'unspecified'>[] | undefined;
}

/** How to watch a job. */
export interface WatchOptions extends CallOptions {
  /** Number of the last event that was seen; those after it are sent. Default: 0, all events. */
  readonly afterSequence?: number | undefined;
  /** Which pictures on the way to send. Default: each iteration's, at most 512 px, as JPEG. */
  readonly preview?: Preview | undefined;
}

/** How to change a job; what is left out stays as it is. */
export interface JobUpdate {
  /** New weights, layers or iteration budgets. */
  readonly options?: StylizeOptions | undefined;
  /** Whether the job is to wait. */
  readonly paused?: boolean | undefined;
  /** Whether the best picture so far is enough. */
  readonly finish?: boolean | undefined;
}

/** A client of one server. Its calls share one connection, which is made at the first call and again when it is lost. */
export class NstClient {
  readonly #connection: Connection;

  constructor(address = 'localhost:50051', options: ClientOptions = {}) {
    this.#connection = new Connection(address, options);
  }

  /** Makes a picture. The call begins when the returned object is looped over, or its `result()` is asked for. */
  stylize(request: StylizeRequest, options: CallOptions = {}): Stylization {
    const requestId = request.requestId ?? randomUUID();
    return new Stylization(this.#connection, {
      onLeave: 'cancel',
      limits: options,
      prepare: (watched, signal) => {
        const preview = request.preview ?? (watched ? undefined : { interval: 0 });
        // The job outlives the connection, not the caller: leaving the loop cancels it.
        const durable = { ...request, requestId, preview, cancelOnDisconnect: false };
        return stylizeMessage(this.#connection, durable, signal);
      },
    });
  }

  /**
   * Creates a job, which outlives this program, and returns it, queued. Asked for again with the same `requestId`, it is
   * the job that is there.
   */
  createJob(request: StylizeRequest, options?: CallOptions): Promise<Job> {
    const requestId = request.requestId ?? randomUUID();
    return this.#within(options, async (signal) => {
      const message = await stylizeMessage(this.#connection, { ...request, requestId }, signal);
      const { CreateJob } = contract.StyleTransferService.service;
      return toPlain(contract.Job, await this.#connection.repeated(CreateJob, { request: message }, signal));
    });
  }

  /** One job, by its name (`jobs/…` or the bare id). */
  async getJob(name: string, options?: CallOptions): Promise<Job> {
    const message = fromPlain(contract.GetJobRequest, { name });
    return toPlain(contract.Job, await this.#call(contract.StyleTransferService.service.GetJob, message, options));
  }

  /** The jobs, the newest first, fetched page by page while you loop. */
  async *listJobs({ pageSize, states, ...options }: ListJobsOptions = {}): AsyncGenerator<Job, void, undefined> {
    let pageToken = '';
    do {
      const message = fromPlain(contract.ListJobsRequest, { pageSize, pageToken, states });
      const page = await this.#call(contract.StyleTransferService.service.ListJobs, message, options);
      for (const job of page.jobs) yield toPlain(contract.Job, job);
      pageToken = page.nextPageToken;
    } while (pageToken);
  }

  /** The events of a job, as those of `stylize`; but leaving the loop, aborting and the deadline leave the job alone. */
  watchJob(name: string, { afterSequence = 0, preview, ...options }: WatchOptions = {}): Stylization {
    fromPlain(contract.WatchJobRequest, { name, afterSequence });
    return new Stylization(this.#connection, {
      onLeave: 'detach',
      limits: options,
      seen: { name, sequence: afterSequence },
      preview: (watched) => {
        const wanted = preview ?? (watched ? undefined : { interval: 0 });
        return wanted && fromPlain(contract.Preview, wanted, 'preview');
      },
    });
  }

  /** Changes, pauses, resumes or finishes a job that has not ended; returns it as it is when that is accepted. */
  async updateJob(name: string, update: JobUpdate, options?: CallOptions): Promise<Job> {
    const message = fromPlain(contract.UpdateJobRequest, { ...update, name });
    return toPlain(contract.Job, await this.#call(contract.StyleTransferService.service.UpdateJob, message, options));
  }

  /** Ends a job and returns it; one that has ended stays as it is. */
  async cancelJob(name: string, options?: CallOptions): Promise<Job> {
    const message = fromPlain(contract.CancelJobRequest, { name });
    return toPlain(contract.Job, await this.#call(contract.StyleTransferService.service.CancelJob, message, options));
  }

  /** Deletes a job with its events and images, ending it first. */
  async deleteJob(name: string, options?: CallOptions): Promise<void> {
    const message = fromPlain(contract.DeleteJobRequest, { name });
    await this.#call(contract.StyleTransferService.service.DeleteJob, message, options);
  }

  /**
   * Stores an image on the server, whatever its size: in parts, going on after an interruption. One that is there
   * already is not sent. What comes back can be given wherever an image can.
   */
  uploadImage(image: ImageFile, options?: CallOptions): Promise<StoredImage> {
    return this.#within(options, async (signal) => {
      const name = await upload(this.#connection, await loadFile(image, 'image'), signal);
      const { GetImage } = contract.ImageService.service;
      return toPlain(contract.StoredImage, await this.#connection.repeated(GetImage, { name }, signal));
    });
  }

  /** What the server knows of an image, by its name (`images/…`). */
  async getImage(name: string, options?: CallOptions): Promise<StoredImage> {
    const message = fromPlain(contract.GetImageRequest, { name });
    return toPlain(contract.StoredImage, await this.#call(contract.ImageService.service.GetImage, message, options));
  }

  /** An image's file, by its name (`images/…`): in parts, going on after an interruption, checked by its SHA-256. */
  async downloadImage(name: string, options?: CallOptions): Promise<EncodedImage> {
    fromPlain(contract.DownloadImageRequest, { name });
    return this.#within(options, (signal) => download(this.#connection, name, signal));
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

  /** A style as a style file: means and Gram matrices without images, for `importStyle` on any server. */
  async exportStyle(name: string, style: StyleExport = {}, options: ExportOptions = {}): Promise<ExportedFile> {
    const message = fromPlain(contract.ExportStyleRequest, { ...style, name });
    const { ExportStyle } = contract.StyleService.service;
    return this.#within(options, (signal) =>
      downloadFile(this.#connection, ExportStyle, message, signal, options.onProgress),
    );
  }

  /** Stores a style file as a style. The same file and id give the same style again. */
  async importStyle(file: Uint8Array | string | URL, options: ImportOptions = {}): Promise<Style> {
    const { id, displayName, ...limits } = options;
    const data = await loadFile(file, 'data');
    const message = fromPlain(contract.ImportStyleRequest, { styleId: id, displayName, data });
    return toPlain(contract.Style, await this.#call(contract.StyleService.service.ImportStyle, message, limits));
  }

  /**
   * A feature model, or all that an optimization evaluates, as a file for another runtime. The server makes one file at a
   * time, which takes it seconds to minutes; a file that breaks off on the way is taken up where it broke.
   */
  async exportModel(model: ModelExport = {}, options: ExportOptions = {}): Promise<ExportedFile> {
    const message = fromPlain(contract.ExportModelRequest, model);
    const { ExportModel } = contract.ModelService.service;
    return this.#within(options, (signal) =>
      downloadFile(this.#connection, ExportModel, message, signal, options.onProgress),
    );
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
    this.#connection.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #call<In, Out>(method: Method<In, Out>, message: In, options: CallOptions = {}): Promise<Out> {
    const limits = { ...options, deadlineMs: options.deadlineMs ?? this.#connection.timeoutMs };
    return this.#within(limits, (signal) => this.#connection.unary(method, message, signal));
  }

  /** Does something that keeps the connection in use, and is over when the signal fires. */
  async #within<T>(options: CallOptions = {}, work: (signal: AbortSignal) => Promise<T>): Promise<T> {
    this.#connection.checkOpen();
    const stop = new AbortController();
    const [release, unlimit] = [this.#connection.hold(), limit(options, stop)];
    try {
      return await work(stop.signal);
    } finally {
      unlimit();
      release();
    }
  }
}
