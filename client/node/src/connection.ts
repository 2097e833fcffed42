// One server: calls that can be aborted, streams that notice when the line is dead, patience with a server that is away.
import { setTimeout as sleep } from 'node:timers/promises';
import { Client, connectivityState, credentials as channelCredentials, status } from '@grpc/grpc-js';
import type { ChannelCredentials, ChannelOptions } from '@grpc/grpc-js';
import type { MethodDefinition } from '@grpc/proto-loader';
import { asNstError, CancelledError, DeadlineExceededError, NstError, UnavailableError } from './errors.js';

/** How to reach the server. */
export interface ClientOptions {
  /** Default: no encryption. */
  readonly credentials?: ChannelCredentials | undefined;
  /** Options of grpc-js. None is needed; gRPC's limits fit the service. */
  readonly channelOptions?: ChannelOptions | undefined;
  /**
   * Milliseconds to keep trying when a server that has answered before does not any more: broken streams are taken up
   * again, and calls that can be repeated are. Counted anew from every event; 0 for no second try. Default: 60,000.
   */
  readonly patienceMs?: number | undefined;
  /**
   * Milliseconds that a call with one answer may take, unless its own `deadlineMs` says otherwise. Not for what lasts as
   * long as a job or a file: `stylize`, `createJob`, `watchJob`, `uploadImage`, `downloadImage`. Default: 120,000.
   */
  readonly timeoutMs?: number | undefined;
}

/** When to give a call up. */
export interface CallOptions {
  /** Aborting it cancels the call, and with `stylize` the job. */
  readonly signal?: AbortSignal | undefined;
  /** Milliseconds until the call, and with `stylize` the job, is given up. Default: see `ClientOptions.timeoutMs`. */
  readonly deadlineMs?: number | undefined;
}

/** A method of the contract. */
export type Method<In, Out> = Pick<
  MethodDefinition<In, unknown, unknown, Out>,
  'path' | 'requestSerialize' | 'responseDeserialize'
>;

const MAX_TIMER_MS = 2 ** 31 - 1;
const FIRST_BACKOFF_MS = 200;
const MAX_BACKOFF_MS = 5_000;
/** The server says something every 10 seconds at least. */
const SILENCE_MS = 30_000;
const TIMEOUT_MS = 120_000;
/** When nothing has come for this long during a call, the server is asked whether it is still there. */
const KEEPALIVE_MS = 45_000;
/** How long the answer may take; the question waits behind images that are being sent. */
const PING_TIMEOUT_MS = 30_000;

/** A connection to one server, made at the first call and again when it is lost. */
export class Connection {
  readonly #options: ClientOptions;
  #client: Client;
  #reached = false;
  #users = 0;
  #closed = false;

  /** `silenceMs`: after how many milliseconds without a message a stream is taken for broken. */
  constructor(
    readonly address: string,
    options: ClientOptions = {},
    private readonly silenceMs = SILENCE_MS,
  ) {
    this.#options = options;
    this.#client = this.#connect();
  }

  /** Whether there was ever a server at the address. */
  get reached(): boolean {
    return this.#reached;
  }

  /** How long a call with one answer may take, milliseconds. */
  get timeoutMs(): number {
    return this.#options.timeoutMs ?? TIMEOUT_MS;
  }

  /** Keeps the connection while it is in use, even if it is closed meanwhile; returns what ends that. */
  hold(): () => void {
    this.#users += 1;
    let held = true;
    return () => {
      if (held) this.#users -= 1;
      held = false;
      if (this.#closed && this.#users === 0) this.#client.close();
    };
  }

  /** Raises NstError if the client was closed. */
  checkOpen(): void {
    if (this.#closed) throw new NstError('the client was closed', { code: status.FAILED_PRECONDITION });
  }

  /** Closes the connection when nobody uses it any more. */
  close(): void {
    this.#closed = true;
    this.hold()();
  }

  /** Patience for one call or stream. */
  patience(): Patience {
    return new Patience(this, this.#options.patienceMs ?? 60_000);
  }

  /** One reply. Raises NstError, or the signal's reason. */
  unary<In, Out>(method: Method<In, Out>, message: In, signal: AbortSignal): Promise<Out> {
    const { path, requestSerialize, responseDeserialize } = method;
    return new Promise<Out>((resolve, reject) => {
      signal.throwIfAborted();
      const answer = (error: unknown, reply?: Out) => {
        signal.removeEventListener('abort', abort);
        if (error) reject(signal.aborted ? signal.reason : asNstError(error, this.address));
        else resolve(reply!);
      };
      const call = this.#client.makeUnaryRequest(path, requestSerialize, responseDeserialize, message, answer);
      const abort = () => call.cancel();
      signal.addEventListener('abort', abort, { once: true });
    });
  }

  /** One reply, asked for again while the server is away: only for what may be done twice. */
  async repeated<In, Out>(method: Method<In, Out>, message: In, signal: AbortSignal): Promise<Out> {
    for (const patience = this.patience(); ;) {
      try {
        return await this.unary(method, message, signal);
      } catch (error) {
        await patience.wait(error, signal);
      }
    }
  }

  /**
   * The messages of a stream. Raises NstError, or the signal's reason. `firstMs` is how long the first message may
   * take, milliseconds.
   */
  async *stream<In, Out>(
    { path, requestSerialize, responseDeserialize }: Method<In, Out>,
    message: In,
    signal: AbortSignal,
    firstMs = this.silenceMs,
  ): AsyncGenerator<Out, void, undefined> {
    signal.throwIfAborted();
    const client = this.#client;
    const call = client.makeServerStreamRequest(path, requestSerialize, responseDeserialize, message);
    const abort = () => call.cancel();
    signal.addEventListener('abort', abort, { once: true });
    let silent = false;
    try {
      const messages = call[Symbol.asyncIterator]() as AsyncIterator<Out, undefined>;
      for (let limitMs = firstMs; ; limitMs = this.silenceMs) {
        const timer = setTimeout(() => ((silent = true), call.cancel()), Math.min(limitMs, MAX_TIMER_MS));
        const { done, value } = await messages.next().finally(() => clearTimeout(timer));
        if (done) return;
        yield value;
      }
    } catch (error) {
      signal.throwIfAborted();
      if (!silent) throw asNstError(error, this.address);
      // A connection that was lost without a word would swallow the next call, too.
      if (client === this.#client) this.#replace();
      throw new UnavailableError(`the server at ${this.address} is not available: it has fallen silent`, {
        code: status.UNAVAILABLE,
        cause: error,
      });
    } finally {
      signal.removeEventListener('abort', abort);
      call.cancel();
    }
  }

  #connect(): Client {
    const client = new Client(this.address, this.#options.credentials ?? channelCredentials.createInsecure(), {
      // While grpc-js waits to connect again, every call fails at once: its waits must not be longer than ours.
      'grpc.initial_reconnect_backoff_ms': FIRST_BACKOFF_MS,
      'grpc.max_reconnect_backoff_ms': MAX_BACKOFF_MS,
      'grpc.keepalive_time_ms': KEEPALIVE_MS,
      'grpc.keepalive_timeout_ms': PING_TIMEOUT_MS,
      // Else the next client would be given this one's connection, dead or alive.
      'grpc.use_local_subchannel_pool': 1,
      ...this.#options.channelOptions,
    });
    this.#notice(client);
    return client;
  }

  #replace(): void {
    this.#client.close();
    this.#client = this.#connect();
  }

  #notice(client: Client): void {
    const channel = client.getChannel();
    const state = channel.getConnectivityState(false);
    if (state === connectivityState.READY) this.#reached = true;
    else if (state !== connectivityState.SHUTDOWN) {
      channel.watchConnectivityState(state, Infinity, () => this.#notice(client));
    }
  }
}

/** How long to put up with a server that is away: the waits grow, with jitter, and end. */
export class Patience {
  #attempt = 0;
  #since: number | undefined;

  /** `ms`: milliseconds from the first failure to the last attempt. */
  constructor(
    private readonly connection: Connection,
    private readonly ms: number,
  ) {}

  /** Begins anew: the server is there. */
  renew(): void {
    this.#attempt = 0;
    this.#since = undefined;
  }

  /**
   * Waits until it is time for another attempt. Raises `error` if none is due, because the patience is used up, there
   * never was a server, or the error is not `worth` it; and the signal's reason.
   */
  async wait(error: unknown, signal: AbortSignal, worth = error instanceof UnavailableError): Promise<void> {
    if (!worth || !this.connection.reached) throw error;
    this.#since ??= performance.now();
    const leftMs = this.#since + this.ms - performance.now();
    const askedMs = (error as { retryAfterMs?: number }).retryAfterMs ?? 0;
    if (leftMs <= askedMs) throw error;
    const backoffMs = Math.min(MAX_BACKOFF_MS, FIRST_BACKOFF_MS * 2 ** this.#attempt++) * (0.5 + Math.random() / 2);
    await sleep(Math.min(askedMs + backoffMs, leftMs), undefined, { signal }).catch(() => signal.throwIfAborted());
  }
}

/**
 * Aborts `stop`, with the error to throw as its reason, when the caller's signal fires or the deadline passes. Returns
 * what ends that.
 */
export function limit({ signal, deadlineMs }: CallOptions, stop: AbortController): () => void {
  const abort = () => stop.abort(new CancelledError('the call was aborted', { cause: signal!.reason }));
  if (signal?.aborted) abort();
  else signal?.addEventListener('abort', abort, { once: true });
  const late = () => {
    const message = `the deadline of ${deadlineMs} ms has passed`;
    stop.abort(new DeadlineExceededError(message, { code: status.DEADLINE_EXCEEDED }));
  };
  const timer = deadlineMs === undefined ? undefined : setTimeout(late, Math.min(deadlineMs, MAX_TIMER_MS));
  return () => {
    clearTimeout(timer);
    signal?.removeEventListener('abort', abort);
  };
}
