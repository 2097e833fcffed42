// One picture on its way.
import { BrokenStreamError, CancelledError, JobCancelledError, JobFailedError, NstError } from './errors.js';
import { EventReader, type ResultEvent, type StylizeEvent } from './events.js';
import type { StylizeResponse } from './generated/nst/v1/StylizeResponse.js';
import type { Job } from './messages.js';

/**
 * The making of one picture. Loop over it for the events, or await `result()`, or both.
 *
 * Nothing is sent before one of the two. Leaving the loop cancels the job. A job that fails throws JobFailedError
 * after its last event.
 */
export class Stylization implements AsyncIterable<StylizeEvent> {
  readonly #start: (watched: boolean) => AsyncGenerator<StylizeEvent, void, undefined>;
  readonly #result = new Deferred<ResultEvent>();
  #started = false;

  /** `start` opens the call; it is told whether somebody watches or only the result is wanted. */
  constructor(start: (watched: boolean) => AsyncGenerator<StylizeEvent, void, undefined>) {
    this.#start = start;
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

  async *#iterate(watched: boolean): AsyncGenerator<StylizeEvent, void, undefined> {
    if (this.#started) throw new NstError('a stylization can be looped over once');
    this.#started = true;
    try {
      for await (const event of this.#start(watched)) {
        if (event.kind === 'result') this.#result.resolve(event);
        yield event;
      }
    } catch (error) {
      this.#result.reject(error);
      throw error;
    } finally {
      this.#result.reject(new CancelledError('the loop was left before the result'));
    }
  }
}

/** The events in a stream of responses; raises if the stream or the job did not end well. */
export async function* readEvents(
  responses: AsyncIterable<StylizeResponse>,
): AsyncGenerator<StylizeEvent, void, undefined> {
  const reader = new EventReader();
  let job: Job | undefined;
  let finished = false;
  try {
    for await (const { event: message } of responses) {
      const event = message && reader.read(message);
      if (!event) continue;
      if (event.kind === 'snapshot' || event.kind === 'stateChange') job = event.job;
      if (event.kind === 'result') finished = true;
      yield event;
    }
  } catch (error) {
    // A connection lost after the job's last event loses nothing.
    if (!isTerminal(job)) throw error;
  }
  if (job?.state === 'failed') throw new JobFailedError(job);
  if (job?.state === 'cancelled') throw new JobCancelledError(job);
  reader.end();
  if (!isTerminal(job)) throw new BrokenStreamError('the stream ended before the job did');
  if (!finished) throw new BrokenStreamError('the job succeeded, but its result did not arrive');
}

function isTerminal(job: Job | undefined): boolean {
  return job !== undefined && ['succeeded', 'failed', 'cancelled'].includes(job.state);
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
