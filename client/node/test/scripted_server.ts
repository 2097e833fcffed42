// The contract on a real loopback socket, with a script for each call.
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { connect, createServer, type Socket } from 'node:net';
import { fileURLToPath } from 'node:url';
import {
  loadPackageDefinition,
  Metadata,
  Server,
  ServerCredentials,
  status,
  type sendUnaryData,
  type ServerUnaryCall,
  type ServerWritableStream,
} from '@grpc/grpc-js';
import { fromJSON, loadSync, type MessageTypeDefinition } from '@grpc/proto-loader';
import type { ImageServiceHandlers } from '../dist/generated/nst/v1/ImageService.js';
import type { ImagePart__Input } from '../dist/generated/nst/v1/ImagePart.js';
import type { JobEvent__Input } from '../dist/generated/nst/v1/JobEvent.js';
import type { ModelServiceHandlers } from '../dist/generated/nst/v1/ModelService.js';
import type { StyleServiceHandlers } from '../dist/generated/nst/v1/StyleService.js';
import type { StyleTransferServiceHandlers } from '../dist/generated/nst/v1/StyleTransferService.js';
import type { StylizeRequest } from '../dist/generated/nst/v1/StylizeRequest.js';
import type { StylizeResponse__Input } from '../dist/generated/nst/v1/StylizeResponse.js';
import type { WatchJobRequest } from '../dist/generated/nst/v1/WatchJobRequest.js';

export type StylizeCall = ServerWritableStream<StylizeRequest, StylizeResponse__Input | Buffer>;
export type WatchCall = ServerWritableStream<WatchJobRequest, StylizeResponse__Input | Buffer>;
export type JobCall = StylizeCall | WatchCall;

// Omit would forget the names that it leaves.
type Jobs = {
  [
    Name in keyof StyleTransferServiceHandlers as Exclude<Name, 'Stylize' | 'WatchJob'>
  ]: StyleTransferServiceHandlers[Name];
};

/** What a server does with its calls. */
export type Script = {
  stylize?: (call: StylizeCall) => void | Promise<void>;
  watch?: (call: WatchCall) => void | Promise<void>;
} & Partial<Jobs & StyleServiceHandlers & ModelServiceHandlers & ImageServiceHandlers>;

const services = ['StyleTransferService', 'StyleService', 'ModelService', 'ImageService'] as const;

const protos = ['style_transfer_service', 'style_service', 'model_service', 'image_service'];

const contract = (
  loadPackageDefinition(
    loadSync(
      protos.map((name) => `nst/v1/${name}.proto`),
      {
        includeDirs: [fileURLToPath(new URL('../proto', import.meta.url))],
        longs: Number,
        enums: String,
        defaults: true,
        arrays: true,
        objects: true,
      },
    ),
  ) as any
).nst.v1;

/** A running server that answers as the script says, and UNIMPLEMENTED to the rest. */
export class ScriptedServer {
  readonly #server = new Server({ 'grpc.max_receive_message_length': 32 << 20 });
  address = '';

  static async start(script: Script): Promise<ScriptedServer> {
    const scripted = new ScriptedServer();
    const { stylize, watch, ...rest } = script;
    const Stylize = (call: StylizeCall) => void stylize?.(call);
    const handlers = { ...rest, Stylize, ...(watch && { WatchJob: (call: WatchCall) => void watch(call) }) };
    for (const name of services) scripted.#server.addService(rawReplies(contract[name].service), handlers as any);
    const port = await new Promise<number>((resolve, reject) => {
      scripted.#server.bindAsync('127.0.0.1:0', ServerCredentials.createInsecure(), (error, port) =>
        error ? reject(error) : resolve(port),
      );
    });
    scripted.address = `127.0.0.1:${port}`;
    return scripted;
  }

  /** Drops every connection. */
  stop(): void {
    this.#server.forceShutdown();
  }
}

/** Lets a script send bytes that the contract does not know. */
function rawReplies(service: Record<string, any>): any {
  const serialize = (method: any) => (reply: unknown) =>
    Buffer.isBuffer(reply) ? reply : method.responseSerialize(reply);
  return Object.fromEntries(
    Object.entries(service).map(([name, method]) => [name, { ...method, responseSerialize: serialize(method) }]),
  );
}

const numbers = new WeakMap<JobCall, number>();

/** The next number of an event without one: the first of a stream is 1. */
function numbered(call: JobCall, { stateChange, progress, result }: JobEvent__Input): number {
  const last = numbers.get(call) ?? 0;
  const next = stateChange || progress || (result && !result.image?.offset) ? last + 1 : last;
  numbers.set(call, next);
  return next;
}

/** Sends one event; resolves when the stream takes more. */
export async function send(call: JobCall, event: JobEvent__Input): Promise<void> {
  const sequence = event.sequence ?? numbered(call, event);
  const header = { attempt: 1, eventTime: { seconds: 1_700_000_000, nanos: 500_000_000 } };
  if (call.write({ event: { ...header, ...event, sequence } })) return;
  const cancelled = new AbortController();
  const stop = () => cancelled.abort();
  call.once('cancelled', stop);
  await once(call, 'drain', { signal: cancelled.signal }).catch(() => undefined);
  call.off('cancelled', stop);
}

/** The parts of an image file, as the server cuts it. */
export function parts(data: Buffer, size = 2 << 20): ImagePart__Input[] {
  const sha256 = createHash('sha256').update(data).digest('hex');
  const cut: ImagePart__Input[] = [];
  for (let offset = 0; offset < data.length; offset += size) {
    const whole = offset + size >= data.length;
    cut.push({
      format: 'IMAGE_FORMAT_PNG',
      width: 40,
      height: 30,
      totalBytes: data.length,
      offset,
      data: data.subarray(offset, offset + size),
      sha256: whole ? sha256 : '',
    });
  }
  return cut;
}

/** A whole job: snapshot, running, `iterations` + 1 progress events and frames, result, succeeded. */
export async function wholeJob(call: JobCall, { iterations = 2, result = Buffer.from('the picture') } = {}) {
  const job = { name: 'jobs/1', model: 'models/tiny', width: 40, height: 30 };
  let sequence = 0;
  await send(call, { sequence, snapshot: { ...job, state: 'JOB_STATE_QUEUED', createTime: { seconds: 1 } } });
  await send(call, { sequence: ++sequence, stateChange: { job: { ...job, state: 'JOB_STATE_RUNNING' } } });
  for (let iteration = 0; iteration <= iterations; iteration++) {
    const progress = { iteration, iterations, loss: 10 / (1 + iteration), styleLosses: { relu1_1: 0.5 } };
    await send(call, { sequence: ++sequence, progress });
    for (const image of parts(Buffer.from(`frame ${iteration}`)))
      await send(call, { sequence, frame: { iteration, image } });
  }
  sequence += 1;
  for (const image of parts(result)) {
    await send(call, {
      sequence,
      result: { image, iteration: iterations, loss: 1.5, stopReason: 'STOP_REASON_ITERATIONS' },
    });
  }
  await send(call, { sequence: ++sequence, stateChange: { job: { ...job, state: 'JOB_STATE_SUCCEEDED' } } });
  call.end();
}

const google = fromJSON({
  nested: {
    Status: {
      fields: {
        code: { type: 'int32', id: 1 },
        message: { type: 'string', id: 2 },
        details: { rule: 'repeated', type: 'Any', id: 3 },
      },
    },
    Any: { fields: { type_url: { type: 'string', id: 1 }, value: { type: 'bytes', id: 2 } } },
    ErrorInfo: {
      fields: {
        reason: { type: 'string', id: 1 },
        domain: { type: 'string', id: 2 },
        metadata: { keyType: 'string', type: 'string', id: 3 } as object as { type: string; id: number },
      },
    },
    BadRequest: { fields: { fieldViolations: { rule: 'repeated', type: 'Violation', id: 1 } } },
    Violation: { fields: { field: { type: 'string', id: 1 }, description: { type: 'string', id: 2 } } },
    RetryInfo: { fields: { retryDelay: { type: 'Duration', id: 1 } } },
    Duration: { fields: { seconds: { type: 'int64', id: 1 }, nanos: { type: 'int32', id: 2 } } },
  },
});

const encode = (name: string, message: object) =>
  (google[name] as unknown as MessageTypeDefinition<object, object>).serialize(message);

/** A status as this service ends a failed call: with google.rpc details in the trailer. */
export function richStatus(code: status, details: string, messages: Record<string, object> = {}) {
  const metadata = new Metadata();
  const packed = Object.entries(messages).map(([name, message]) => ({
    type_url: `type.googleapis.com/google.rpc.${name}`,
    value: encode(name, message),
  }));
  metadata.set('grpc-status-details-bin', encode('Status', { code, message: details, details: packed }));
  return { code, details, metadata };
}

/** Answers a unary call. */
export function reply<Q, R>(answer: (request: Q) => R) {
  return (call: ServerUnaryCall<Q, R>, done: sendUnaryData<R>) => done(null, answer(call.request));
}

/** A wire between a client and a server, to be cut. */
export class Wire {
  readonly #server;
  readonly #sockets = new Set<Socket>();
  address = '';
  /** How many there were. */
  connections = 0;

  private constructor(target: string) {
    const port = Number(target.slice(target.lastIndexOf(':') + 1));
    this.#server = createServer((near) => {
      this.connections += 1;
      const far = connect(port, '127.0.0.1');
      near.pipe(far).pipe(near);
      for (const socket of [near, far]) this.#sockets.add(socket.on('error', () => undefined));
    });
  }

  static async to(target: string): Promise<Wire> {
    const wire = new Wire(target);
    await once(wire.#server.listen(0, '127.0.0.1'), 'listening');
    const bound = wire.#server.address();
    if (bound && typeof bound === 'object') wire.address = `127.0.0.1:${bound.port}`;
    return wire;
  }

  /** Lets nothing through any more, without a word to either end; new connections are possible. */
  deaden(): void {
    for (const socket of this.#sockets) socket.unpipe();
  }

  /** Cuts every connection; new ones are possible. */
  cut(): void {
    for (const socket of this.#sockets) socket.resetAndDestroy();
    this.#sockets.clear();
  }

  close(): void {
    this.cut();
    this.#server.close();
  }
}
