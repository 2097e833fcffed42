// The client against a scripted server: every promise of the README that needs no feature model.
import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import { mkdtemp, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { pathToFileURL } from 'node:url';
import { status } from '@grpc/grpc-js';
import * as nst from '@nst/client';
import {
  BrokenStreamError,
  CancelledError,
  DeadlineExceededError,
  InvalidArgumentError,
  JobCancelledError,
  JobFailedError,
  NstClient,
  NstError,
  QueueFullError,
  ResourceExhaustedError,
  ServerError,
  UnavailableError,
  type Job,
  type JobState,
  type StylizeOptions,
} from '@nst/client';
import type { JobEvent__Input } from '../dist/generated/nst/v1/JobEvent.js';
import type { StylizeRequest } from '../dist/generated/nst/v1/StylizeRequest.js';
import { contract, definitions } from './inside.js';
import { collect, connect, events, FINISHED, open, PHOTO, rejection } from './scripted_client.js';
import { described, recorded } from './described.js';
import { parts, reply, richStatus, ScriptedServer, send, wholeJob, Wire, type StylizeCall } from './scripted_server.js';

/** A client whose every job consists of these events. */
function scripted(...events: (JobEvent__Input | Buffer)[]): Promise<NstClient> {
  return connect({
    async stylize(call) {
      for (const event of events) {
        if (Buffer.isBuffer(event)) call.write(event);
        else await send(call, event);
      }
      call.end();
    },
  });
}

/** The error that a job of these events throws. */
async function failure(...events: (JobEvent__Input | Buffer)[]): Promise<Error> {
  return rejection(collect((await scripted(...events)).stylize(PHOTO)));
}

test('the public names are these', () => {
  assert.deepEqual(Object.keys(nst), [
    'AlreadyExistsError',
    'BrokenStreamError',
    'CancelledError',
    'DeadlineExceededError',
    'FailedPreconditionError',
    'InvalidArgumentError',
    'JobCancelledError',
    'JobFailedError',
    'NotFoundError',
    'NstClient',
    'NstError',
    'QueueFullError',
    'ResourceExhaustedError',
    'ServerError',
    'UnavailableError',
    'credentials',
    'readParameters',
  ]);
});

test('types follow the contract: choices without prefix, dates, absent messages as undefined', () => {
  const state: JobState = 'succeeded';
  const job: Pick<Job, 'state' | 'startTime'> = { state };
  const options: StylizeOptions = { sizePx: 64, init: 'noise', styleLayers: { relu1_1: 1 }, seed: undefined };
  // @ts-expect-error - 'done' is no state
  const noState: JobState = 'done';
  // @ts-expect-error - the option is called sizePx
  const noOption: StylizeOptions = { size_px: 64 };
  // @ts-expect-error - nobody chooses 'unspecified'
  const noChoice: StylizeOptions = { init: 'unspecified' };
  assert.ok([state, job, options, noState, noOption, noChoice]);
});

test('a stream is typed events in order', async () => {
  const client = await connect({ stylize: (call) => wholeJob(call) });
  const all = await collect(client.stylize(PHOTO));

  const iteration = ['progress', 'frame'];
  const kinds = ['snapshot', 'stateChange', ...iteration, ...iteration, ...iteration, 'result', 'stateChange'];
  assert.deepEqual(
    all.map(({ kind }) => kind),
    kinds,
  );
  const [snapshot, running] = all;
  assert.ok(snapshot?.kind === 'snapshot' && running?.kind === 'stateChange');
  assert.equal(snapshot.job.state, 'queued');
  assert.deepEqual(snapshot.job.createTime, new Date(1000));
  assert.equal(snapshot.job.startTime, undefined);
  assert.equal(snapshot.job.error, undefined);
  assert.deepEqual([running.sequence, running.attempt, running.time], [1, 1, new Date(1_700_000_000_500)]);
  assert.equal(running.job.state, 'running');
  const progress = events(all, 'progress');
  assert.deepEqual(
    progress.map(({ sequence, iteration, loss }) => [sequence, iteration, loss]),
    [
      [2, 0, 10],
      [3, 1, 5],
      [4, 2, 10 / 3],
    ],
  );
  assert.deepEqual(progress[0]?.styleLosses, { relu1_1: 0.5 });
  const frame = events(all, 'frame')[1];
  assert.deepEqual([frame?.iteration, frame?.skipped, frame?.image.data.toString()], [1, 0, 'frame 1']);
  const result = events(all, 'result')[0];
  assert.deepEqual([result?.iteration, result?.loss, result?.stopReason], [2, 1.5, 'iterations']);
  const { data, sha256, ...picture } = result!.image;
  assert.deepEqual(picture, { format: 'png', width: 40, height: 30 });
  assert.deepEqual([data.toString(), sha256], ['the picture', createHash('sha256').update(data).digest('hex')]);
});

test("a result of 40 MB arrives in parts under gRPC's default receive limit", async () => {
  const result = randomBytes(40_000_001);
  const client = await connect({ stylize: (call) => wholeJob(call, { result }) });
  const { image } = await client.stylize(PHOTO).result();
  assert.ok(image.data.equals(result));
});

test('progress may come between the parts of a picture', async () => {
  const [first, second] = parts(Buffer.from('abcdef'), 3);
  const client = await scripted(
    { frame: { iteration: 4, image: first! } },
    { progress: { iteration: 5 } },
    { frame: { iteration: 4, image: second! } },
    { result: { image: parts(Buffer.from('r'))[0]! } },
    FINISHED,
  );
  const all = await collect(client.stylize(PHOTO));
  assert.deepEqual(
    all.map(({ kind }) => kind),
    ['progress', 'frame', 'result', 'stateChange'],
  );
});

test('an event kind, a field and a choice newer than this client do no harm', async () => {
  // StylizeResponse { event (1): JobEvent { sequence (1): 7, 99: 'new' } }
  const unknown = Buffer.from([0x0a, 8, 0x08, 7, 0x9a, 0x06, 3, 0x6e, 0x65, 0x77]);
  const client = await scripted(
    { snapshot: { name: 'jobs/1', state: 99 as never } },
    unknown,
    { result: { image: parts(Buffer.from('r'))[0]! } },
    FINISHED,
  );
  const all = await collect(client.stylize(PHOTO));
  assert.deepEqual(
    all.map(({ kind }) => kind),
    ['snapshot', 'result', 'stateChange'],
  );
  assert.ok(all[0]?.kind === 'snapshot' && all[0].job.state === 'unspecified');
});

test('a picture whose parts do not fit is a BrokenStreamError', async () => {
  const [first, second] = parts(Buffer.from('abcdef'), 3) as [any, any];
  const broken: [RegExp, any[]][] = [
    [/has a part at 3 where 0 was due/, [second]],
    [/has a part at 4 where 3 was due/, [first, { ...second, offset: 4 }]],
    [/has the SHA-256 .* not 00/, [first, { ...second, sha256: '00' }]],
    [/has the SHA-256 .* not given/, [first, { ...second, sha256: '' }]],
    [/is longer than its 6 bytes/, [first, { ...second, data: Buffer.alloc(9) }]],
    [/has parts of different totalBytes/, [first, { ...second, totalBytes: 7 }]],
    [/has an empty part/, [{ ...first, data: Buffer.alloc(0) }]],
    [/ended after 3 of 6 bytes/, [first]],
  ];
  for (const [message, images] of broken) {
    const error = await failure(...images.map((image) => ({ result: { image } })), FINISHED);
    assert.ok(error instanceof BrokenStreamError, String(error));
    assert.match(error.message, message);
  }
});

test('a stream that ends before the job, or without its result, is a BrokenStreamError', async () => {
  const early = await failure({ snapshot: { state: 'JOB_STATE_RUNNING' } });
  assert.ok(early instanceof BrokenStreamError);
  assert.match(early.message, /ended before the job/);
  const without = await failure(FINISHED);
  assert.ok(without instanceof BrokenStreamError);
  assert.match(without.message, /result did not arrive/);
});

test('a failed job throws JobFailedError after its last event', async () => {
  const error = { code: 8, reason: 'OUT_OF_MEMORY', message: 'the device ran out of memory' };
  const client = await scripted({ stateChange: { job: { name: 'jobs/1', state: 'JOB_STATE_FAILED', error } } });
  const seen: string[] = [];
  const stylization = client.stylize(PHOTO);
  const thrown = await rejection(
    (async () => {
      for await (const event of stylization) seen.push(event.kind);
    })(),
  );
  assert.deepEqual(seen, ['stateChange']);
  assert.ok(thrown instanceof JobFailedError);
  assert.deepEqual([thrown.code, thrown.reason, thrown.message], [8, 'OUT_OF_MEMORY', 'the device ran out of memory']);
  assert.equal(thrown.job.name, 'jobs/1');
  assert.equal(await rejection(stylization.result()), thrown);
});

test('a job that the server cancelled throws JobCancelledError', async () => {
  const error = await failure({ stateChange: { job: { name: 'jobs/1', state: 'JOB_STATE_CANCELLED' } } });
  assert.ok(error instanceof JobCancelledError);
  assert.equal(error.message, 'jobs/1 was cancelled');
});

test('rich details become typed errors', async () => {
  const violation = { field: 'options.iterations', description: 'must be at least 1, not 0' };
  const message = 'options.iterations must be at least 1, not 0';
  const info = { reason: 'OUT_OF_RANGE', domain: 'nst' };
  const details = { ErrorInfo: info, BadRequest: { fieldViolations: [violation] } };
  const client = await connect({
    stylize: (call) => void call.emit('error', richStatus(status.INVALID_ARGUMENT, message, details)),
    GetStyle: (_call, done) => done(richStatus(status.NOT_FOUND, 'there is no styles/x', { ErrorInfo: info })),
  });
  const invalid = await rejection(client.stylize(PHOTO).result());
  assert.ok(invalid instanceof InvalidArgumentError);
  assert.deepEqual([invalid.message, invalid.field, invalid.code], [message, 'options.iterations', 3]);
  assert.deepEqual([invalid.name, invalid.reason], ['InvalidArgumentError', 'OUT_OF_RANGE']);
  assert.deepEqual({ ...invalid.violations[0] }, violation);
  const missing = await rejection(client.getStyle('x'));
  assert.ok(missing instanceof nst.NotFoundError);
  assert.equal(missing.reason, 'OUT_OF_RANGE');
});

test('a full queue says when to come back; other exhaustion does not', async () => {
  const wait = { RetryInfo: { retryDelay: { seconds: 2, nanos: 500_000_000 } } };
  const client = await connect({
    stylize: (call) => void call.emit('error', richStatus(status.RESOURCE_EXHAUSTED, 'the queue is full', wait)),
    CreateStyle: (_call, done) => done(richStatus(status.RESOURCE_EXHAUSTED, 'the data folder is full')),
  });
  const full = await rejection(client.stylize(PHOTO).result());
  assert.ok(full instanceof QueueFullError && full instanceof ResourceExhaustedError);
  assert.equal(full.retryAfterMs, 2500);
  const exhausted = await rejection(client.createStyle({ images: PHOTO.styles }));
  assert.ok(exhausted instanceof ResourceExhaustedError && !(exhausted instanceof QueueFullError));
});

test('every status has its class, and none lets a ServiceError out', async () => {
  const classes = {
    [status.ALREADY_EXISTS]: nst.AlreadyExistsError,
    [status.FAILED_PRECONDITION]: nst.FailedPreconditionError,
    [status.NOT_FOUND]: nst.NotFoundError,
    [status.UNAVAILABLE]: UnavailableError,
    [status.DEADLINE_EXCEEDED]: DeadlineExceededError,
    [status.INTERNAL]: ServerError,
    [status.PERMISSION_DENIED]: ServerError,
  };
  let code = 0;
  const client = await connect({ GetStyle: (_call, done) => done({ code, details: 'why' }) });
  for (const [number, type] of Object.entries(classes)) {
    code = Number(number);
    const error = await rejection(client.getStyle('x'));
    assert.equal(error.constructor, type);
    assert.ok(error instanceof NstError && error.message.endsWith('why') && error.code === code);
  }
  const missing = await rejection(client.describeOptions());
  assert.ok(missing instanceof ServerError && missing.code === status.UNIMPLEMENTED);
});

test('unreadable details still give the status', async () => {
  const error = richStatus(status.NOT_FOUND, 'gone');
  error.metadata.set('grpc-status-details-bin', Buffer.from([0xff, 0xff, 0xff]));
  const client = await connect({ GetStyle: (_call, done) => done(error) });
  assert.ok((await rejection(client.getStyle('x'))) instanceof nst.NotFoundError);
});

test('no server is an UnavailableError that names the address', async () => {
  const client = new NstClient('127.0.0.1:1');
  const error = await rejection(client.stylize(PHOTO).result());
  assert.ok(error instanceof UnavailableError);
  assert.match(error.message, /^the server at 127\.0\.0\.1:1 is not available: .*ECONNREFUSED/);
  client.close();
});

test('without patience a connection lost on the way is an UnavailableError, and the next call connects again', async () => {
  const server = await ScriptedServer.start({
    stylize: (call) => send(call, { snapshot: {} }),
    ListModels: reply(() => ({ models: [{ name: 'models/a' }] })),
  });
  const wire = await Wire.to(server.address);
  const client = new NstClient(wire.address, { patienceMs: 0 });
  open.push(
    () => server.stop(),
    () => wire.close(),
    () => client.close(),
  );
  const error = await rejection(
    (async () => {
      for await (const _ of client.stylize(PHOTO)) wire.cut();
    })(),
  );
  assert.ok(error instanceof UnavailableError, String(error));
  assert.equal((await client.listModels()).length, 1);
});

test('a server that stops in the middle and does not come back is an UnavailableError', async () => {
  const server = await ScriptedServer.start({ stylize: (call) => send(call, { snapshot: {} }) });
  const client = new NstClient(server.address, { patienceMs: 300 });
  open.push(() => client.close());
  const error = await rejection(
    (async () => {
      for await (const _ of client.stylize(PHOTO)) server.stop();
    })(),
  );
  assert.ok(error instanceof UnavailableError, String(error));
});

test('a connection lost after the last event loses nothing', async () => {
  const client = await connect({
    async stylize(call) {
      await send(call, { result: { image: parts(Buffer.from('r'))[0]! } });
      await send(call, FINISHED);
      call.emit('error', { code: status.UNAVAILABLE, details: 'connection lost' });
    },
  });
  assert.equal((await collect(client.stylize(PHOTO))).length, 2);
});

test('a closed client says so, and a call that was under way ends well', async () => {
  const client = await connect({ stylize: (call) => wholeJob(call), ListModels: reply(() => ({})) });
  const stylization = client.stylize(PHOTO);
  for await (const event of stylization) if (event.kind === 'snapshot') client.close();
  assert.equal((await stylization.result()).image.data.toString(), 'the picture');
  for (const call of [client.listModels(), client.stylize(PHOTO).result()]) {
    const error = await rejection(call);
    assert.ok(error instanceof NstError && error.message === 'the client was closed', String(error));
  }
});

test('leaving the loop cancels the call', async () => {
  const { client, cancelled } = await endless();
  const stylization = client.stylize(PHOTO);
  for await (const event of stylization) if (event.kind === 'progress') break;
  await cancelled;
  assert.ok((await rejection(stylization.result())) instanceof CancelledError);
});

test('aborting cancels the call, whether the loop waits or works', async () => {
  for (const where of ['waits', 'works']) {
    const { client, cancelled } = await endless();
    const controller = new AbortController();
    const reason = new Error('the user has left');
    const error = await rejection(
      (async () => {
        for await (const event of client.stylize(PHOTO, { signal: controller.signal })) {
          if (event.kind !== 'progress') continue;
          if (where === 'works') controller.abort(reason);
          else setTimeout(() => controller.abort(reason), 20);
        }
      })(),
    );
    assert.ok(error instanceof CancelledError);
    assert.equal(error.cause, reason);
    await cancelled;
  }
});

test('an aborted signal starts nothing', async () => {
  let calls = 0;
  const client = await connect({ stylize: () => void calls++, ListModels: () => void calls++ });
  const signal = AbortSignal.abort();
  assert.ok((await rejection(client.stylize(PHOTO, { signal }).result())) instanceof CancelledError);
  assert.ok((await rejection(client.listModels({ signal }))) instanceof CancelledError);
  assert.equal(calls, 0);
});

test('a deadline ends the call', async () => {
  const { client, cancelled } = await endless();
  const error = await rejection(collect(client.stylize(PHOTO, { deadlineMs: 100 })));
  assert.ok(error instanceof DeadlineExceededError);
  await cancelled;
});

test('unary calls can be aborted and have deadlines', async () => {
  const client = await connect({ GetStyle: () => undefined });
  const late = await rejection(client.getStyle('x', { deadlineMs: 50 }));
  assert.ok(late instanceof DeadlineExceededError);
  const controller = new AbortController();
  const waiting = rejection(client.getStyle('x', { signal: controller.signal }));
  await sleep(20);
  controller.abort();
  assert.ok((await waiting) instanceof CancelledError);
});

test('a server that says nothing is not waited for: calls with one answer have a deadline by themselves', async () => {
  const client = await connect({ GetJob: () => undefined, DeleteJob: () => undefined }, { timeoutMs: 50 });
  for (const call of [client.getJob('x'), client.deleteJob('x')]) {
    const late = await rejection(call);
    assert.ok(late instanceof DeadlineExceededError, String(late));
  }
  const slow = await connect(
    { GetJob: (_, answer) => void setTimeout(() => answer(null, { name: 'jobs/x' }), 150) },
    { timeoutMs: 50 },
  );
  assert.equal((await slow.getJob('x', { deadlineMs: 5_000 })).name, 'jobs/x', 'a deadline of its own goes first');
});

/** A job that sends progress until it is cancelled. */
async function endless() {
  let ended!: () => void;
  const cancelled = new Promise<void>((resolve) => (ended = resolve));
  const client = await connect({
    async stylize(call) {
      call.on('cancelled', ended);
      await send(call, { snapshot: { state: 'JOB_STATE_RUNNING' } });
      for (let iteration = 0; !call.cancelled; iteration++) {
        await send(call, { progress: { iteration } });
        await sleep(5);
      }
    },
  });
  return { client, cancelled };
}

test('a slow loop holds the server back instead of filling memory, and misses nothing that was sent', async () => {
  const frames = 100;
  const data = Buffer.alloc(512 << 10, 7);
  let sent = 0;
  const client = await connect({
    async stylize(call) {
      for (let iteration = 0; iteration < frames && !call.cancelled; iteration++) {
        await send(call, { frame: { iteration, image: parts(data)[0]! } });
        sent++;
      }
      await send(call, { result: { image: parts(data)[0]! } });
      await send(call, FINISHED);
      call.end();
    },
  });
  let received = 0;
  for await (const event of client.stylize(PHOTO)) {
    if (event.kind === 'frame') assert.equal(event.iteration, received++);
    if (received === 1) {
      await sleep(500);
      const ahead = sent;
      await sleep(300);
      assert.equal(sent, ahead, 'the server was not held back');
      assert.ok(ahead <= 40, `the server ran ${ahead} frames ahead`);
    }
  }
  assert.equal(received, frames);
});

test('result() alone makes the call without previews; with a loop it is what the loop saw', async () => {
  const requests: StylizeRequest[] = [];
  const client = await connect({
    stylize(call: StylizeCall) {
      requests.push(call.request);
      return wholeJob(call);
    },
  });
  const alone = client.stylize(PHOTO);
  assert.equal(await alone.result(), await alone.result());
  const looped = client.stylize(PHOTO);
  const [result] = events(await collect(looped), 'result');
  assert.equal(await looped.result(), result);
  await client.stylize({ ...PHOTO, preview: { interval: 5 } }).result();
  assert.deepEqual(
    requests.map(({ preview }) => preview?.interval),
    [0, undefined, 5],
  );
  await assert.rejects(collect(looped), /looped over once/);
});

test('a request carries what was given and nothing else', async () => {
  let request: StylizeRequest | undefined;
  const client = await connect({
    stylize(call: StylizeCall) {
      request = call.request;
      return wholeJob(call);
    },
  });
  const folder = await mkdtemp(join(tmpdir(), 'nst-'));
  const path = join(folder, 'style.png');
  await writeFile(path, 'from a file');
  await client
    .stylize({
      content: new Uint8Array([1, 2, 3]),
      styles: [path, pathToFileURL(path), { style: 'styles/waves', weight: 2 }, { image: path, weight: 0 }],
      model: 'models/vgg19',
      options: { iterations: 0, init: 'noise', seed: 2 ** 32 - 1, contentLayers: { relu4_2: 0.5 }, sizePx: undefined },
      preview: { interval: 0, encoding: { format: 'webp', quality: 80 } },
      output: { format: 'jpeg' },
    })
    .result();
  assert.ok(request);
  assert.deepEqual([...request.content!.data!], [1, 2, 3]);
  assert.deepEqual(
    request.styles.map(({ image, style, weight }) => [image?.data?.toString() ?? style, weight]),
    [
      ['from a file', undefined],
      ['from a file', undefined],
      ['styles/waves', 2],
      ['from a file', 0],
    ],
  );
  assert.equal(request.model, 'models/vgg19');
  const { iterations, init, seed, contentLayers, sizePx } = request.options!;
  assert.deepEqual([iterations, init, seed, sizePx], [0, 'INIT_NOISE', 2 ** 32 - 1, undefined]);
  assert.deepEqual(contentLayers, { relu4_2: 0.5 });
  assert.deepEqual([request.preview?.interval, request.preview?.encoding?.quality], [0, 80]);
  assert.equal(request.output?.format, 'IMAGE_FORMAT_JPEG');
});

test('every option of the contract arrives as it was given', async () => {
  let request: StylizeRequest | undefined;
  const client = await connect({
    stylize(call: StylizeCall) {
      request = call.request;
      return wholeJob(call);
    },
  });
  const { field: fields } = contract.StylizeOptions.type as unknown as { field: OptionField[] };
  assert.ok(fields.length >= 25);
  for (const field of fields) {
    for (const [given, expected] of samples(field)) {
      await client.stylize({ ...PHOTO, options: { [field.name]: given } }).result();
      const { [field.name]: arrived, ...others } = request!.options as unknown as Record<string, unknown>;
      assert.deepEqual(arrived, expected, field.name);
      assert.deepEqual(others, unset(fields, field.name), `${field.name} set another option`);
    }
  }
});

interface OptionField {
  name: string;
  type: string;
  label: string;
  typeName: string;
}

/** The choices of an enum, as the wire has them; the first is for none. */
function choicesOf({ typeName }: OptionField): string[] {
  const { value } = definitions[`nst.v1.${typeName}`]!.type as unknown as { value: { name: string }[] };
  return value.map(({ name }) => name);
}

/** Values to give an option, and how each arrives. */
function samples(field: OptionField): [given: unknown, arrived: unknown][] {
  if (field.type === 'TYPE_ENUM') {
    const [unspecified, ...choices] = choicesOf(field);
    const prefix = unspecified!.slice(0, -'UNSPECIFIED'.length);
    return choices.map((choice) => [choice.slice(prefix.length).toLowerCase(), choice]);
  }
  const values: Record<string, unknown[]> = {
    TYPE_BOOL: [true, false],
    TYPE_DOUBLE: [0, 0.1],
    TYPE_MESSAGE: [{ relu1_1: 0.25, relu3_1: 0 }],
  };
  const samples = values[field.type] ?? (field.label === 'LABEL_REPEATED' ? [[9, 5]] : [0, 7]);
  return samples.map((value) => [value, value]);
}

/** How the options that were not given arrive. */
function unset(fields: OptionField[], given: string): Record<string, unknown> {
  const unset: Record<string, unknown> = {};
  for (const field of fields.filter(({ name }) => name !== given)) {
    if (field.type === 'TYPE_ENUM') unset[field.name] = choicesOf(field)[0];
    else if (field.type === 'TYPE_MESSAGE') unset[field.name] = {};
    else if (field.label === 'LABEL_REPEATED') unset[field.name] = [];
  }
  return unset;
}

test('masks and the picture to start from are read like every other image', async () => {
  let request: StylizeRequest | undefined;
  const client = await connect({
    stylize(call: StylizeCall) {
      request = call.request;
      return wholeJob(call);
    },
  });
  const path = join(await mkdtemp(join(tmpdir(), 'nst-')), 'mask.png');
  await writeFile(path, 'a mask');
  await client
    .stylize({
      ...PHOTO,
      styles: [
        { image: Buffer.from('waves'), weight: 2, region: path, styleRegion: Buffer.from('its sky') },
        { style: 'styles/starry', region: pathToFileURL(path), styleRegion: undefined },
        Buffer.from('plain'),
      ],
      initImage: path,
      options: { scaleIterations: [9, 5], deterministic: false },
      output: { format: 'tiff', bitDepth: 16 },
    })
    .result();
  assert.ok(request);
  assert.deepEqual(
    request.styles.map((style) => [style.region?.data?.toString(), style.styleRegion?.data?.toString(), style.weight]),
    [
      ['a mask', 'its sky', 2],
      ['a mask', undefined, undefined],
      [undefined, undefined, undefined],
    ],
  );
  assert.equal(request.initImage?.data?.toString(), 'a mask');
  assert.deepEqual([request.output?.format, request.output?.bitDepth], ['IMAGE_FORMAT_TIFF', 16]);
  const { init, scaleIterations, deterministic } = request.options!;
  assert.deepEqual([init, scaleIterations, deterministic], ['INIT_UNSPECIFIED', [9, 5], false]);
});

test('what the wire format would silently bend is refused before anything is sent, naming the field', async () => {
  const client = new NstClient('127.0.0.1:1');
  const wrong: [object, string, RegExp][] = [
    [{ options: { iteration: 5 } }, 'options.iteration', /is not a field/],
    [{ iterations: 5 }, 'iterations', /is not a field/],
    [{ options: { iterations: 2.5 } }, 'options.iterations', /whole number from -2147483648 to 2147483647, not 2\.5/],
    [{ options: { iterations: NaN } }, 'options.iterations', /not NaN/],
    [{ options: { sizePx: '64' } }, 'options.size_px', /must be a whole number .*, not "64"/],
    [{ options: { seed: -1 } }, 'options.seed', /from 0 to 4294967295, not -1/],
    [{ options: { styleWeight: '1' } }, 'options.style_weight', /must be a number, not "1"/],
    [{ options: { styleLayers: { relu1_1: true } } }, 'options.style_layers[relu1_1]', /must be a number, not true/],
    [{ options: { styleLayers: ['relu1_1'] } }, 'options.style_layers', /must be an object, not an array/],
    [{ options: { init: 'photo' } }, 'options.init', /must be one of "content", "noise", .*, "image", not "photo"/],
    [{ options: { deterministic: 1 } }, 'options.deterministic', /must be a boolean, not 1/],
    [{ options: { scaleIterations: 5 } }, 'options.scale_iterations', /must be an array, not 5/],
    [{ options: { scaleIterations: [5, 1.5] } }, 'options.scale_iterations[1]', /must be a whole number .*, not 1\.5/],
    [{ output: { bitDepth: '16' } }, 'output.bit_depth', /must be a whole number .*, not "16"/],
    [{ output: { format: 'bmp' } }, 'output.format', /must be one of "jpeg", "png", "webp", "tiff", not "bmp"/],
    [{ initImage: '/no/such/file' }, 'init_image', /cannot be read: ENOENT/],
    [{ styles: [{ style: 'x', region: '/no/such/file' }] }, 'styles[0].region', /cannot be read: ENOENT/],
    [{ styles: [{ image: Buffer.from('s'), styleRegion: 5 }] }, 'styles[0].style_region', /must be a Uint8Array/],
    [{ styles: [{ style: 'x', region: '' }] }, 'styles[0].region', /cannot be read: ENOENT/],
    [{ options: { init: 'unspecified' } }, 'options.init', /must be one of/],
    [{ output: 'png' }, 'output', /must be an object, not "png"/],
    [{ content: '/no/such/file' }, 'content', /cannot be read: ENOENT/],
    [{ content: undefined }, 'content', /must be a Uint8Array, a path/],
    [{ styles: 'a.png' }, 'styles', /must be an array/],
    [{ styles: ['/no/such/file'] }, 'styles[0].image', /cannot be read: ENOENT/],
    [{ styles: [{ style: 'x', weigth: 2 }] }, 'styles[0].weigth', /is not a field/],
  ];
  for (const [request, field, message] of wrong) {
    const error = await rejection(client.stylize({ ...PHOTO, ...request } as never).result());
    assert.ok(error instanceof InvalidArgumentError, `${field}: ${error}`);
    assert.equal(error.field, field);
    assert.match(error.message, message);
    assert.ok(error.message.startsWith(field));
  }
  client.close();
});

test('styles: create, get, list page by page, delete', async () => {
  const requests: unknown[] = [];
  const record = <Q, R>(answer: (request: Q) => R) =>
    reply<Q, R>((request) => {
      requests.push(request);
      return answer(request);
    });
  const client = await connect({
    CreateStyle: record(({ styleId, style }) => ({ name: `styles/${styleId}`, displayName: style!.displayName })),
    GetStyle: record(({ name }) => ({ name, images: [{ width: 3, sha256: 'ab' }], createTime: { seconds: 60 } })),
    ListStyles: record(({ pageToken }) =>
      pageToken === ''
        ? { styles: [{ name: 'styles/a' }, { name: 'styles/b' }], nextPageToken: 'more' }
        : { styles: [{ name: 'styles/c' }] },
    ),
    DeleteStyle: record(() => ({})),
  });
  const images = [{ image: Buffer.from('s'), weight: 3 }, Buffer.from('t')];
  const created = await client.createStyle({ images, id: 'waves', displayName: 'Waves' });
  assert.deepEqual([created.name, created.displayName], ['styles/waves', 'Waves']);
  const sent = (requests[0] as any).style.images;
  assert.deepEqual([sent[0].weight, sent[1].weight, String(sent[1].image.data)], [3, undefined, 't']);

  const style = await client.getStyle('styles/waves');
  assert.deepEqual(style.createTime, new Date(60_000));
  assert.deepEqual([style.images[0]?.width, style.images[0]?.sha256], [3, 'ab']);

  const names: string[] = [];
  for await (const { name } of client.listStyles({ pageSize: 2 })) names.push(name);
  assert.deepEqual(names, ['styles/a', 'styles/b', 'styles/c']);
  assert.deepEqual(
    requests.slice(2).map((request: any) => [request.pageSize, request.pageToken]),
    [
      [2, ''],
      [2, 'more'],
    ],
  );
  assert.equal(await client.deleteStyle('styles/waves'), undefined);
});

test('models of every page, and options with their names here', async () => {
  const client = await connect({
    ListModels: reply(({ pageToken }) =>
      pageToken
        ? { models: [{ name: 'models/b', state: 'MODEL_STATE_NOT_FETCHED' }] }
        : { models: [{ name: 'models/a', state: 'MODEL_STATE_AVAILABLE', isDefault: true }], nextPageToken: 'x' },
    ),
    DescribeOptions: reply(() => ({
      options: [
        { name: 'size_px', type: 'OPTION_TYPE_INTEGER', defaultValue: { numberValue: 512 }, minimum: 16, unit: 'px' },
        { name: 'init', type: 'OPTION_TYPE_CHOICE', defaultValue: { stringValue: 'content' }, choices: ['content'] },
        {
          name: 'content_layers',
          type: 'OPTION_TYPE_LAYER_WEIGHTS',
          defaultValue: { structValue: { fields: { relu4_2: { numberValue: 1 } } } },
        },
        { name: 'deterministic', type: 'OPTION_TYPE_BOOLEAN', defaultValue: { boolValue: false } },
        {
          name: 'scale_iterations',
          type: 'OPTION_TYPE_INTEGERS',
          defaultValue: { listValue: { values: [{ numberValue: 9 }, { numberValue: 5 }] } },
        },
      ],
      presets: [
        {
          name: 'gatys',
          description: 'The paper.',
          options: { preset: 'PRESET_GATYS', sizePx: 64, contentLayers: { relu4_2: 1 }, init: 99 as never },
        },
      ],
    })),
  });
  const models = await client.listModels();
  assert.deepEqual(
    models.map(({ name, state }) => [name, state]),
    [
      ['models/a', 'available'],
      ['models/b', 'not_fetched'],
    ],
  );
  const options = await client.describeOptions();
  assert.deepEqual(
    options.map(({ name, key, type, defaultValue, minimum }) => [name, key, type, defaultValue, minimum]),
    [
      ['size_px', 'sizePx', 'integer', 512, 16],
      ['init', 'init', 'choice', 'content', undefined],
      ['content_layers', 'contentLayers', 'layer_weights', { relu4_2: 1 }, undefined],
      ['deterministic', 'deterministic', 'boolean', false, undefined],
      ['scale_iterations', 'scaleIterations', 'integers', [9, 5], undefined],
    ],
  );
  const [preset] = await client.describePresets();
  assert.deepEqual([preset?.name, preset?.description], ['gatys', 'The paper.']);
  const { preset: chosen, sizePx, contentLayers, ...rest } = preset!.options;
  assert.deepEqual([chosen, sizePx, contentLayers], ['gatys', 64, { relu4_2: 1 }]);
  assert.ok(!('init' in rest), 'a choice that cannot be sent back');
});

test("a preset's options can be sent as they are", async () => {
  let request: StylizeRequest | undefined;
  const client = await connect({
    stylize(call: StylizeCall) {
      request = call.request;
      return wholeJob(call);
    },
    DescribeOptions: reply(() => ({ presets: [{ options: { preset: 'PRESET_GATYS', pooling: 'POOLING_AVERAGE' } }] })),
  });
  const [preset] = await client.describePresets();
  await client.stylize({ ...PHOTO, options: { ...preset!.options, seed: 3 } }).result();
  const { preset: chosen, pooling, seed, init } = request!.options!;
  assert.deepEqual([chosen, pooling, seed, init], ['PRESET_GATYS', 'POOLING_AVERAGE', 3, 'INIT_UNSPECIFIED']);
});

test('a result of every format says how it was made, and its options can be sent again', async () => {
  const options = {
    sizePx: 64,
    init: 'noise',
    styleLayers: { relu1_1: 2, relu2_1: 1 },
    scaleIterations: [9, 5],
    deterministic: true,
  };
  const expected = {
    version: '0.1.0',
    model: 'vgg16-hed',
    modelSha256: 'aa',
    options,
    contentSha256: 'bb',
    styles: [
      {
        name: 'styles/sea',
        sha256: ['11', '22'],
        weight: 2,
        regionSha256: undefined,
        styleRegionSha256: undefined,
      },
      { name: undefined, sha256: ['33'], weight: 1, regionSha256: '44', styleRegionSha256: '55' },
    ],
    initImageSha256: '66',
    loss: 0.5,
    iteration: 7,
    stopReason: 'iterations',
  };
  for (const [format, file] of Object.entries(described(JSON.stringify(recorded)))) {
    assert.deepEqual(await nst.readParameters(file), expected, format);
  }
  const path = join(await mkdtemp(join(tmpdir(), 'nst-')), 'result.png');
  await writeFile(path, described(JSON.stringify(recorded)).png!);
  assert.deepEqual(await nst.readParameters(path), expected);

  let request: StylizeRequest | undefined;
  const client = await connect({
    stylize(call: StylizeCall) {
      request = call.request;
      return wholeJob(call);
    },
  });
  const parameters = await nst.readParameters(path);
  await client.stylize({ ...PHOTO, model: parameters.model, options: { ...parameters.options, sizePx: 32 } }).result();
  const { sizePx, init, scaleIterations } = request!.options!;
  assert.deepEqual([request!.model, sizePx, init, scaleIterations], ['vgg16-hed', 32, 'INIT_NOISE', [9, 5]]);
});

test('a newer field or reason in the parameters does no harm; a loss may be missing', async () => {
  const text = JSON.stringify({ ...recorded, camera: 'x', stop_reason: 'bored', loss: null });
  const { stopReason, loss } = await nst.readParameters(described(text).png!);
  assert.deepEqual([stopReason, loss], ['unspecified', NaN]);
});

test('a picture without parameters, with damaged ones, or with those of a newer version is refused', async () => {
  const png = (text: string) => described(text).png!;
  const changed = (change: object) => png(JSON.stringify({ ...recorded, nst: '2.0', ...change }));
  const whole = png(JSON.stringify(recorded));
  const wrong: [nst.ImageFile, RegExp][] = [
    ...['', 'abc', 'a holiday', '"nst"', '5', '[]', '{"title":"x"}'].map((text): [Buffer, RegExp] => [
      png(text),
      /^the picture carries no parameters of nst: it was made by/,
    ]),
    [whole.subarray(0, 33), /^the picture carries no parameters of nst/],
    [whole.subarray(0, -200), /^the picture is not an image file that can be read: its description ends early/],
    [whole.subarray(0, 60), /^the picture is not an image file that can be read/],
    [Buffer.from('text'), /^the picture is not an image file that can be read: it is not PNG, JPEG, WebP or TIFF/],
    ['/no/such/file', /^picture cannot be read: ENOENT/],
    [changed({ styles: 5 }), /^the parameters in the picture are damaged: 5 is not an array/],
    [changed({ styles: [{ sha256: ['a'] }] }), /are damaged: undefined is not a number/],
    [changed({ options: 5 }), /are damaged: the options are not an object/],
    [changed({ model: null }), /are damaged: null is not a string/],
    [changed({ options: { film_grain: 3 } }), /is from a newer version, nst 2\.0: options\.film_grain is not a field/],
    [changed({ options: { init: 'dream' } }), /is from a newer version, nst 2\.0: options\.init must be one of/],
  ];
  for (const [source, message] of wrong) {
    const error = await rejection(nst.readParameters(source));
    assert.ok(error instanceof InvalidArgumentError, String(error));
    assert.match(error.message, message);
  }
});

test('a process whose jobs were cancelled ends by itself', async () => {
  const { client } = await endless();
  const warnings: Error[] = [];
  const remember = (error: Error) => warnings.push(error);
  process.on('uncaughtExceptionMonitor', remember);
  for (let job = 0; job < 20; job++) for await (const _ of client.stylize(PHOTO)) break;
  await sleep(50);
  process.off('uncaughtExceptionMonitor', remember);
  assert.deepEqual(warnings, []);
});
