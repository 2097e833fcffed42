// One picture on its way, whatever happens to the connection.
import { limit, type CallOptions, type Connection } from './connection.js';
import { contract } from './contract.js';
import {
  BrokenStreamError,
  CancelledError,
  JobCancelledError,
  JobFailedError,
  NstError,
  QueueFullError,
  UnavailableError,
} from './errors.js';
import { EventReader, type ResultEvent, type StylizeEvent } from './events.js';
import type { Preview__Input as PreviewMessage } from './generated/nst/v1/Preview.js';
import type { StylizeRequest__Input as StylizeMessage } from './generated/nst/v1/StylizeRequest.js';
import type { Job } from './messages.js';

const { service } = contract.StyleTransferService;

/** How long a job that was cancelled before its first event may take to tell its name, and CancelJob to be answered. */
const CANCEL_WITHIN_MS = 10_000;
const LEFT = 'the stream was left before the result';

/** Which job to follow, and how. */
export type JobSource = {
  /** What happens to the job when the loop is left. */
  readonly onLeave: 'cancel' | 'detach';
  readonly limits: CallOptions;
} & (
  | {
      /** The job to make; `watched` tells whether somebody wants previews. */
      readonly prepare: (watched: boolean, signal: AbortSignal) => Promise<StylizeMessage>;
    }
  | {
      /** Name of a job that is there, and the number of the last event that was seen of it. */
      readonly seen: { readonly name: string; readonly sequence: number };
      /** Which previews to send; `watched` as above. */
      readonly preview: (watched: boolean) => PreviewMessage | undefined;
    }
);

/**
 * The making of one picture. Loop over it for the events, or await `result()`, or both.
 *
 * Nothing is sent before one of the two. A stream that breaks is taken up again where it broke: each event comes once.
 * A job that fails throws JobFailedError after its last event.
 */
export class Stylization implements AsyncIterable<StylizeEvent> {
  readonly #connection: Connection;
  readonly #source: JobSource;
  readonly #result = new Deferred<ResultEvent>();
  /** Ends the loop; its reason is thrown there. */
  readonly #stop = new AbortController();
  /** Ends the stream. */
  readonly #line = new AbortController();
  #onLeave: JobSource['onLeave'];
  #left: Promise<void> | undefined;
  #started = false;
  /** The next event, while it is awaited. */
  #next: Promise<unknown> = Promise.resolve();
  /** Whether the server may have been asked for a job that has not told its name. */
  #nameless = false;
  /** Why a loop that was detached from ends. */
  #detached: CancelledError | undefined;
  /** Whether there is nothing left to cancel: the job has ended, or cannot be reached. */
  #settled = false;
  #name = '';
  #job: Job | undefined;
  #lastSequence = 0;
  #lastFrame = -1;
  #snapshotSeen = false;
  /** Whether the result came, or came before the events that were asked for. */
  #finished = false;

  constructor(connection: Connection, source: JobSource) {
    this.#connection = connection;
    this.#source = source;
    this.#onLeave = source.onLeave;
    if ('seen' in source) ({ name: this.#name, sequence: this.#lastSequence } = source.seen);
    this.#finished = this.#lastSequence > 0;
  }

  /** The job as the newest event has it; undefined before the first. */
  get job(): Job | undefined {
    return this.#job;
  }

  [Symbol.asyncIterator](): AsyncGenerator<StylizeEvent, void, undefined> {
    return this.#iterate(true);
  }

  /**
   * The finished picture. With a loop it is the one that the loop sees: await it after the loop, for inside it would
   * wait for itself. Without a loop this makes the call, and asks for no previews unless the request does.
   */
  async result(): Promise<ResultEvent> {
    if (!this.#started) for await (const _ of this.#iterate(false));
    return this.#result.promise;
  }

  /**
   * Cancels the job and hangs up: a loop throws CancelledError. Resolves when the job has ended; raises NstError if the
   * server cannot be told.
   */
  async cancel(): Promise<void> {
    if (!this.#left) this.#onLeave = 'cancel';
    this.#stop.abort(new CancelledError('the job was cancelled'));
    await this.#leave();
  }

  /** Hangs up and leaves the job to itself: a loop ends. `job.name` is what to watch it by. */
  detach(): void {
    if (!this.#left) this.#onLeave = 'detach';
    this.#stop.abort((this.#detached = new CancelledError(LEFT)));
    void this.#leave();
  }

  async *#iterate(watched: boolean): AsyncGenerator<StylizeEvent, void, undefined> {
    if (this.#started) throw new NstError('a stylization can be looped over once');
    this.#started = true;
    const { signal } = this.#stop;
    const release = this.#connection.hold();
    const unlimit = limit(this.#source.limits, this.#stop);
    const leave = () => void this.#leave().catch(() => undefined).finally(release); // prettier-ignore
    signal.addEventListener('abort', leave, { once: true });
    const events = this.#events(watched);
    try {
      this.#connection.checkOpen();
      for (;;) {
        signal.throwIfAborted();
        const next = events.next();
        this.#next = next;
        const { done, value } = await unlessAborted(next, signal);
        if (done) break;
        if (value.kind === 'result') this.#result.resolve(value);
        yield value;
      }
      this.#settled = true;
      this.#result.reject(new NstError(`the result is older than the events asked for; ${this.#name} names it`));
    } catch (error) {
      // A server that cannot be reached cannot be told to cancel either; one that refused has nothing to cancel.
      if (!signal.aborted && (error instanceof UnavailableError || !this.#name)) this.#settled = true;
      this.#result.reject(error);
      if (error !== this.#detached) throw error;
    } finally {
      this.#result.reject(new CancelledError(LEFT));
      unlimit();
      leave();
      void events.return().catch(() => undefined);
    }
  }

  /** The events that the caller has not seen, from as many streams as it takes. */
  async *#events(watched: boolean): AsyncGenerator<StylizeEvent, void, undefined> {
    const { signal } = this.#line;
    const open = await this.#opener(watched);
    const patience = this.#connection.patience();
    let reader!: EventReader;
    for (let attempt = 0; ; attempt++) {
      reader = new EventReader(); // parts of a picture that was broken off come again
      try {
        for await (const { event: message } of open()) {
          const event = message && reader.read(message);
          // A server that only says where the job stands, and breaks off again, has not done better.
          if (!message?.snapshot) patience.renew();
          if (event && this.#isNew(event)) yield event;
        }
        break;
      } catch (error) {
        if (this.#settled) break; // a connection lost after the job's last event loses nothing
        // With a first attempt that got in, the job has its place in the queue already.
        const crowded = error instanceof QueueFullError && attempt > 0 && !this.#name;
        const worth = error instanceof UnavailableError || crowded;
        await patience.wait(error, signal, worth).catch((last: unknown) => {
          throw last instanceof UnavailableError && this.#name ? lost(this.#name, last) : last;
        });
      }
    }
    this.#checkEnd(reader);
  }

  /** What opens the next stream: the one that makes the job, or one that goes on from what was seen. */
  async #opener(watched: boolean): Promise<() => AsyncIterable<{ event: Parameters<EventReader['read']>[0] | null }>> {
    const { signal } = this.#line;
    const source = this.#source;
    const watch = (preview: PreviewMessage | undefined) => {
      const message = { name: this.#name, afterSequence: this.#lastSequence, preview: preview ?? null };
      return this.#connection.stream(service.WatchJob, message, signal);
    };
    if ('seen' in source) return () => watch(source.preview(watched));
    const request = await source.prepare(watched, signal);
    return () => {
      if (this.#name) return watch(request.preview ?? undefined);
      this.#nameless = true;
      // Images may take long to arrive there.
      return this.#connection.stream(service.Stylize, request, signal, Infinity);
    };
  }

  /** Whether the caller has not seen an event; notes what it says. */
  #isNew(event: StylizeEvent): boolean {
    if (event.kind === 'snapshot' || event.kind === 'stateChange') {
      this.#name ||= event.job.name;
      if (!this.#job || event.job.sequence >= this.#job.sequence) this.#job = event.job;
    }
    if (event.kind === 'snapshot') {
      const again = this.#snapshotSeen;
      this.#snapshotSeen = true;
      return !again;
    }
    if (event.kind === 'frame') {
      // Iterations that are made again, after a crash of the server, show what was seen already.
      if (event.iteration <= this.#lastFrame) return false;
      this.#lastFrame = event.iteration;
      return true;
    }
    if (event.sequence <= this.#lastSequence) return false;
    this.#lastSequence = event.sequence;
    if (event.kind === 'result') this.#finished = true;
    if (event.kind === 'stateChange' && isTerminal(event.job)) this.#settled = true;
    return true;
  }

  #checkEnd(reader: EventReader): void {
    const job = this.#job;
    if (job?.state === 'failed') throw new JobFailedError(job);
    if (job?.state === 'cancelled') throw new JobCancelledError(job);
    reader.end();
    if (!isTerminal(job)) throw new BrokenStreamError('the stream ended before the job did');
    if (!this.#finished) throw new BrokenStreamError('the job succeeded, but its result did not arrive');
  }

  /** Hangs up and, unless the job is to go on, cancels it. Done once; raises what CancelJob does. */
  #leave(): Promise<void> {
    return (this.#left ??= this.#hangUp());
  }

  async #hangUp(): Promise<void> {
    const release = this.#connection.hold();
    const stop = new AbortController();
    const unlimit = limit({ deadlineMs: CANCEL_WITHIN_MS }, stop);
    try {
      if (this.#onLeave === 'cancel' && this.#nameless && !this.#name && !this.#settled) {
        // The job may be there, but only its first event tells its name.
        await unlessAborted(this.#next, stop.signal).catch(() => undefined);
      }
      this.#line.abort();
      if (this.#onLeave === 'detach' || !this.#name || this.#settled) return;
      await this.#connection.repeated(service.CancelJob, { name: this.#name }, stop.signal);
    } finally {
      unlimit();
      release();
    }
  }
}

function isTerminal(job: Job | undefined): boolean {
  return job !== undefined && ['succeeded', 'failed', 'cancelled'].includes(job.state);
}

function unlessAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  return new Promise<T>((resolve, reject) => {
    const abort = () => reject(signal.reason);
    if (signal.aborted) abort();
    signal.addEventListener('abort', abort, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener('abort', abort));
  });
}

function lost(name: string, error: UnavailableError): UnavailableError {
  const { code, reason, metadata, retryAfterMs, cause } = error;
  const details = { code, reason, metadata: { ...metadata }, retryAfterMs, cause };
  return new UnavailableError(`${name} may go on, but ${error.message}`, details);
}

/** A promise to be settled from outside; nobody needs to wait for it. */
class Deferred<T> {
  resolve!: (value: T) => void;
  reject!: (reason: unknown) => void;
  readonly promise = new Promise<T>((resolve, reject) => {
    this.resolve = resolve;
    this.reject = reject;
  });

  constructor() {
    this.promise.catch(() => undefined);
  }
}
