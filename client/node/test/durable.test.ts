// What outlives a connection: streams, jobs, uploads and downloads that go on, against a scripted server.
import assert from 'node:assert/strict';
import { createHash, randomBytes } from 'node:crypto';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { status } from '@grpc/grpc-js';
import {
  BrokenStreamError,
  CancelledError,
  InvalidArgumentError,
  NotFoundError,
  NstClient,
  NstError,
  UnavailableError,
  type Job,
  type StylizeEvent,
} from '@nst/client';
import type { ExportModelRequest } from '../dist/generated/nst/v1/ExportModelRequest.js';
import type { FilePart__Input } from '../dist/generated/nst/v1/FilePart.js';
import type { JobEvent__Input } from '../dist/generated/nst/v1/JobEvent.js';
import type { Image } from '../dist/generated/nst/v1/Image.js';
import type { StylizeRequest } from '../dist/generated/nst/v1/StylizeRequest.js';
import type { WatchJobRequest } from '../dist/generated/nst/v1/WatchJobRequest.js';
import { Connection, contract } from './inside.js';
import { collect, connect, open, PHOTO, rejection } from './scripted_client.js';
import { parts, reply, richStatus, ScriptedServer, send, Wire, type JobCall, type Script } from './scripted_server.js';

const NAME = 'jobs/1';
const AWAY = richStatus(status.UNAVAILABLE, 'away for a moment');
const RESULT = randomBytes(100_000);

/** The events of a job that makes two iterations, by number; event 0 is the snapshot of `sequence`. */
function event(number: number, sequence = number): JobEvent__Input[] {
  const iteration = number - 2;
  if (number === 0) return [{ sequence, snapshot: { name: NAME, state: 'JOB_STATE_RUNNING', sequence } }];
  if (number === 1) return [{ sequence, stateChange: { job: { name: NAME, state: 'JOB_STATE_RUNNING' } } }];
  if (number <= 4) {
    const frame = { iteration, image: parts(Buffer.from(`frame ${iteration}`))[0]! };
    return [
      { sequence, progress: { iteration, iterations: 2 } },
      { sequence, frame },
    ];
  }
  if (number === 5) return parts(RESULT, 30_000).map((image) => ({ sequence, result: { image, loss: 1.5 } }));
  return [{ sequence, stateChange: { job: { name: NAME, state: 'JOB_STATE_SUCCEEDED', sequence } } }];
}

/** Sends the snapshot and the events after one number up to another. */
async function tell(call: JobCall, after: number, last: number): Promise<void> {
  for (const message of event(0, after)) await send(call, message);
  for (let number = after + 1; number <= last; number++) for (const message of event(number)) await send(call, message);
}

const broken = (call: JobCall, error: object = AWAY) => void call.emit('error', error);

const WHOLE = [0, 1, 2, 2, 3, 3, 4, 4, 5, 6];
const sequences = (all: StylizeEvent[]) => all.map(({ sequence }) => sequence);

/** A server whose streams end in turn as `streams` say; and what it was asked. */
function inTurn(...streams: ((call: JobCall, after: number) => void | Promise<void>)[]) {
  const asked: { stylize: StylizeRequest[]; watch: WatchJobRequest[]; cancelled: string[] } = {
    stylize: [],
    watch: [],
    cancelled: [],
  };
  const script: Script = {
    stylize(call) {
      asked.stylize.push(call.request);
      return streams.shift()?.(call, 0);
    },
    watch(call) {
      asked.watch.push(call.request);
      return streams.shift()?.(call, call.request.afterSequence);
    },
    CancelJob: reply(({ name }) => (asked.cancelled.push(name), { name, state: 'JOB_STATE_CANCELLED' as const })),
  };
  return { script, asked };
}

const toTheEnd = async (call: JobCall, after: number) => {
  await tell(call, after, 6);
  call.end();
};

test('a stream that breaks before its first event is asked for again, by the same requestId', async () => {
  const { script, asked } = inTurn(
    (call) => broken(call),
    (call) => broken(call),
    toTheEnd,
  );
  const client = await connect(script);
  const all = await collect(client.stylize(PHOTO));
  assert.deepEqual(sequences(all), WHOLE);
  const [first, ...again] = asked.stylize.map(({ requestId }) => requestId);
  assert.match(first!, /^[0-9a-f-]{36}$/);
  assert.deepEqual(again, [first, first]);
  assert.ok(asked.stylize.every(({ cancelOnDisconnect }) => cancelOnDisconnect === false));
  assert.equal(asked.watch.length, 0);
});

test("the caller's own requestId is sent", async () => {
  const { script, asked } = inTurn(toTheEnd);
  const client = await connect(script);
  await client.stylize({ ...PHOTO, requestId: 'order-17' }).result();
  assert.equal(asked.stylize[0]?.requestId, 'order-17');
});

test('a queue that is full when a request is sent again is waited for, for the job may have its place', async () => {
  const wait = { RetryInfo: { retryDelay: { seconds: 0, nanos: 1e6 } } };
  const full = richStatus(status.RESOURCE_EXHAUSTED, 'the queue is full', wait);
  const { script } = inTurn(
    (call) => broken(call),
    (call) => broken(call, full),
    toTheEnd,
  );
  const client = await connect(script);
  assert.deepEqual(sequences(await collect(client.stylize(PHOTO))), WHOLE);
});

test('a stream that breaks anywhere goes on there: every event once, one snapshot, the same previews wanted', async () => {
  for (let after = 0; after <= 5; after++) {
    const { script, asked } = inTurn(async (call) => {
      await tell(call, 0, after);
      broken(call);
    }, toTheEnd);
    const client = await connect(script);
    const preview = { interval: 1, sizePx: 100 };
    const stylization = client.stylize({ ...PHOTO, preview });
    const all = await collect(stylization);
    assert.deepEqual(sequences(all), WHOLE, `broken off after ${after}`);
    assert.equal((await stylization.result()).image.data.compare(RESULT), 0);
    assert.equal(asked.stylize.length, 1);
    assert.deepEqual(
      asked.watch.map(({ name, afterSequence, preview }) => [name, afterSequence, preview?.sizePx]),
      [[NAME, after, 100]],
    );
    assert.equal(stylization.job?.state, 'succeeded');
    await sleep(20);
    assert.deepEqual(asked.cancelled, [], 'a job that has ended is not cancelled');
  }
});

test('parts of a result that was broken off are dropped, and the whole comes again', async () => {
  const { script, asked } = inTurn(async (call) => {
    await tell(call, 0, 4);
    for (const part of event(5).slice(0, 2)) await send(call, part);
    broken(call);
  }, toTheEnd);
  const client = await connect(script);
  const stylization = client.stylize(PHOTO);
  assert.deepEqual(sequences(await collect(stylization)), WHOLE);
  assert.equal((await stylization.result()).image.data.compare(RESULT), 0);
  assert.equal(asked.watch[0]?.afterSequence, 4, 'a result is not received before its last part');
});

test('what comes again is not shown again', async () => {
  const { script } = inTurn(
    async (call) => {
      await tell(call, 0, 3);
      broken(call);
    },
    async (call) => {
      await tell(call, 1, 6);
      call.end();
    },
  );
  const client = await connect(script);
  assert.deepEqual(sequences(await collect(client.stylize(PHOTO))), WHOLE);
});

test('frames never go back: iterations that are made again after a crash are not shown again', async () => {
  const frame = (iteration: number, attempt: number) => ({
    sequence: 2,
    attempt,
    frame: { iteration, image: parts(Buffer.from(`frame ${iteration}`))[0]! },
  });
  const { script } = inTurn(
    async (call) => {
      await tell(call, 0, 1);
      for (const iteration of [0, 1, 2]) await send(call, frame(iteration, 1));
      broken(call);
    },
    async (call) => {
      await tell(call, 1, 1);
      for (const iteration of [1, 2, 3]) await send(call, frame(iteration, 2));
      for (const number of [5, 6]) for (const message of event(number)) await send(call, message);
      call.end();
    },
  );
  const client = await connect(script);
  const all = await collect(client.stylize(PHOTO));
  assert.deepEqual(
    all.flatMap((event) => (event.kind === 'frame' ? [event.iteration] : [])),
    [0, 1, 2, 3],
  );
});

test('heartbeats and kinds of event that are newer than this client are swallowed', async () => {
  const { script } = inTurn(async (call) => {
    await tell(call, 0, 2);
    await send(call, { sequence: 2, heartbeat: {} });
    for (let number = 3; number <= 6; number++) for (const message of event(number)) await send(call, message);
    call.end();
  });
  const client = await connect(script);
  assert.deepEqual(sequences(await collect(client.stylize(PHOTO))), WHOLE);
});

test('a server that stops says when to come back, and is not asked sooner', async () => {
  const wait = { ErrorInfo: { reason: 'SERVER_STOPPING' }, RetryInfo: { retryDelay: { seconds: 0, nanos: 6e8 } } };
  let stopped = 0;
  let back = 0;
  const { script } = inTurn(
    async (call) => {
      await tell(call, 0, 2);
      stopped = performance.now();
      broken(call, richStatus(status.UNAVAILABLE, 'the server is stopping', wait));
    },
    (call, after) => {
      back = performance.now();
      return toTheEnd(call, after);
    },
  );
  const client = await connect(script);
  assert.deepEqual(sequences(await collect(client.stylize(PHOTO))), WHOLE);
  assert.ok(back - stopped >= 600, `it was asked again after ${back - stopped} ms`);
});

test('a connection that is cut, and a server that is replaced, lose nothing', async () => {
  const { script, asked } = inTurn(
    (call) => tell(call, 0, 2),
    (call, after) => tell(call, after, 3),
    toTheEnd,
  );
  const server = await ScriptedServer.start(script);
  const wire = await Wire.to(server.address);
  const client = new NstClient(wire.address);
  open.push(
    () => server.stop(),
    () => wire.close(),
    () => client.close(),
  );
  const all: StylizeEvent[] = [];
  for await (const event of client.stylize(PHOTO)) {
    all.push(event);
    if (event.kind === 'frame' && event.sequence < 4) wire.cut();
  }
  assert.deepEqual(sequences(all), WHOLE);
  assert.deepEqual(
    asked.watch.map(({ afterSequence }) => afterSequence),
    [2, 3],
  );
  assert.equal(wire.connections, 3);
});

test('patience ends: an UnavailableError that names the job, which is left alone', async () => {
  let watched = 0;
  const { script, asked } = inTurn(async (call) => {
    await tell(call, 0, 2);
    broken(call);
  });
  // A server that says where the job stands and breaks off again is no progress.
  script.watch = async (call) => {
    watched += 1;
    await tell(call, 2, 2);
    broken(call);
  };
  const client = await connect(script, { patienceMs: 700 });
  const began = performance.now();
  const stylization = client.stylize(PHOTO);
  const error = await rejection(collect(stylization));
  const tookMs = performance.now() - began;
  assert.ok(error instanceof UnavailableError, String(error));
  assert.match(error.message, /^jobs\/1 may go on, but the server at .* is not available: away for a moment$/);
  assert.ok(tookMs >= 690 && tookMs < 3000, `it took ${tookMs} ms`);
  assert.ok(watched >= 2 && watched <= 8, `it tried ${watched} times`);
  assert.equal(await rejection(stylization.result()), error);
  await sleep(50);
  assert.deepEqual(asked.cancelled, []);
});

test('patience is counted from the last event', async () => {
  const late = Array.from({ length: 4 }, (_, index) => async (call: JobCall, after: number) => {
    await sleep(150);
    await tell(call, after, index + 1);
    broken(call);
  });
  const { script } = inTurn(...late, toTheEnd);
  const client = await connect(script, { patienceMs: 400 });
  assert.deepEqual(sequences(await collect(client.stylize(PHOTO))), WHOLE);
});

test('a stream that fell silent is taken for broken, and its connection for dead', async () => {
  const { script } = inTurn((call) => tell(call, 0, 2), toTheEnd);
  const server = await ScriptedServer.start(script);
  const wire = await Wire.to(server.address);
  const connection = new Connection(wire.address, {}, 300);
  open.push(
    () => server.stop(),
    () => wire.close(),
    () => connection.close(),
  );
  const { WatchJob } = contract.StyleTransferService.service;
  const { signal } = new AbortController();
  const read = async (then: () => void) => {
    for await (const _ of connection.stream(WatchJob, { name: NAME }, signal)) then();
  };
  const error = await rejection(read(() => wire.deaden()));
  assert.ok(error instanceof UnavailableError);
  assert.match(error.message, /has fallen silent/);
  await read(() => undefined);
  assert.equal(wire.connections, 2);
});

test('leaving the loop, aborting, the deadline and cancel() all send CancelJob and hang up', async () => {
  const ways: Record<string, (client: NstClient, told: () => Promise<void>) => Promise<unknown>> = {
    async leaving(client) {
      for await (const event of client.stylize(PHOTO)) if (event.kind === 'progress') break;
    },
    async aborting(client, told) {
      const stop = new AbortController();
      for await (const _ of client.stylize(PHOTO, { signal: stop.signal })) {
        stop.abort();
        await told(); // though the loop is busy
      }
    },
    deadline: (client) => collect(client.stylize(PHOTO, { deadlineMs: 200 })),
    async cancel(client) {
      const stylization = client.stylize(PHOTO);
      setTimeout(() => void stylization.cancel(), 200);
      await collect(stylization);
    },
  };
  for (const [way, leave] of Object.entries(ways)) {
    let hungUp = false;
    const { script, asked } = inTurn(async (call) => {
      call.once('cancelled', () => (hungUp = true));
      await tell(call, 0, 3);
    });
    const client = await connect(script);
    const told = async () => {
      while (!hungUp || asked.cancelled.length === 0) await sleep(5);
    };
    const error = await leave(client, told).catch((error: unknown) => error);
    assert.ok(way === 'leaving' ? error === undefined : error instanceof NstError, `${way}: ${error}`);
    await told();
    assert.deepEqual(asked.cancelled, [NAME], way);
  }
});

test('cancel() resolves when the server has ended the job, and the loop throws CancelledError', async () => {
  const { script, asked } = inTurn((call) => tell(call, 0, 3));
  const client = await connect(script);
  const stylization = client.stylize(PHOTO);
  const events = stylization[Symbol.asyncIterator]();
  await events.next();
  await stylization.cancel();
  assert.deepEqual(asked.cancelled, [NAME]);
  assert.ok((await rejection(events.next())) instanceof CancelledError);
  assert.ok((await rejection(stylization.result())) instanceof CancelledError);
  await stylization.cancel();
  assert.equal(asked.cancelled.length, 1, 'once is enough');
});

test('a job that is cancelled before its first event is cancelled as soon as its name is known', async () => {
  const { script, asked } = inTurn(async (call) => {
    await sleep(200);
    await tell(call, 0, 2);
  });
  const client = await connect(script);
  const began = performance.now();
  const error = await rejection(collect(client.stylize(PHOTO, { signal: AbortSignal.timeout(50) })));
  assert.ok(error instanceof CancelledError);
  assert.ok(performance.now() - began < 180, 'aborting does not wait for the server');
  client.close(); // which does not keep it from being told
  while (asked.cancelled.length === 0) await sleep(5);
  assert.deepEqual(asked.cancelled, [NAME]);
});

test('detach() ends the loop and leaves the job running', async () => {
  let hungUp = false;
  const { script, asked } = inTurn(
    async (call) => {
      call.once('cancelled', () => (hungUp = true));
      await tell(call, 0, 3);
    },
    (call, after) => toTheEnd(call, after),
  );
  const client = await connect(script);
  const stylization = client.stylize(PHOTO);
  let last = 0;
  for await (const event of stylization) {
    last = event.sequence;
    if (event.sequence === 2) stylization.detach();
  }
  assert.equal(last, 2);
  assert.match(String(await rejection(stylization.result())), /CancelledError: the stream was left/);
  while (!hungUp) await sleep(5);

  const { name } = stylization.job!;
  const rest = await collect(client.watchJob(name, { afterSequence: last }));
  assert.deepEqual(sequences(rest), [2, 3, 3, 4, 4, 5, 6]);
  await sleep(50);
  assert.deepEqual(asked.cancelled, []);
});

test('watchJob follows any job, through breaks; leaving it or aborting does nothing to the job, cancel() does', async () => {
  const { script, asked } = inTurn(async (call, after) => {
    await tell(call, after, 4);
    broken(call);
  }, toTheEnd);
  const client = await connect(script);
  const watch = client.watchJob(NAME, { afterSequence: 2, preview: { interval: 3 } });
  assert.deepEqual(sequences(await collect(watch)), [2, 3, 3, 4, 4, 5, 6]);
  assert.equal((await watch.result()).loss, 1.5);
  assert.deepEqual(
    asked.watch.map(({ afterSequence, preview }) => [afterSequence, preview?.interval]),
    [
      [2, 3],
      [4, 3],
    ],
  );
  const { script: endless, asked: told } = inTurn(
    ...Array.from({ length: 3 }, () => (call: JobCall) => tell(call, 0, 3)),
  );
  const other = await connect(endless);
  for await (const _ of other.watchJob(NAME)) break;
  const stop = new AbortController();
  const aborted = (async () => {
    for await (const _ of other.watchJob(NAME, { signal: stop.signal })) stop.abort();
  })();
  assert.ok((await rejection(aborted)) instanceof CancelledError);
  await sleep(50);
  assert.deepEqual(told.cancelled, []);
  const third = other.watchJob(NAME);
  const cancelled = (async () => {
    for await (const _ of third) await third.cancel();
  })();
  assert.ok((await rejection(cancelled)) instanceof CancelledError);
  assert.deepEqual(told.cancelled, [NAME]);
});

test('an ended job is watched to its end, and one whose result was seen is not missing it', async () => {
  const { script } = inTurn(
    async (call) => {
      // Its progress has been dropped, and the connection is lost right after the snapshot.
      await send(call, { snapshot: { name: NAME, state: 'JOB_STATE_SUCCEEDED', sequence: 6 } });
      broken(call);
    },
    async (call) => {
      await send(call, { snapshot: { name: NAME, state: 'JOB_STATE_SUCCEEDED', sequence: 6 } });
      for (const number of [5, 6]) for (const message of event(number)) await send(call, message);
      call.end();
    },
    async (call) => {
      await send(call, { sequence: 6, snapshot: { name: NAME, state: 'JOB_STATE_SUCCEEDED', sequence: 6 } });
      call.end();
    },
  );
  const client = await connect(script);
  assert.deepEqual(sequences(await collect(client.watchJob(NAME))), [0, 5, 6]);
  const watch = client.watchJob(NAME, { afterSequence: 6 });
  assert.deepEqual(sequences(await collect(watch)), [6]);
  assert.match(String(await rejection(watch.result())), /the result is older than the events asked for/);
});

test('where nobody ever answered, every call fails at once, patience or not', async () => {
  const client = new NstClient('127.0.0.1:1');
  open.push(() => client.close());
  const began = performance.now();
  const calls = [
    collect(client.stylize(PHOTO)),
    collect(client.watchJob(NAME)),
    client.createJob(PHOTO),
    client.uploadImage(Buffer.from('a photo')),
    client.downloadImage('images/aa'),
  ];
  for (const error of await Promise.all(calls.map(rejection))) assert.ok(error instanceof UnavailableError);
  assert.ok(performance.now() - began < 2000);
});

test('createJob is sent again with the same requestId until it is answered', async () => {
  const requests: (StylizeRequest | null)[] = [];
  const client = await connect({
    CreateJob(call, done) {
      if (requests.push(call.request.request) < 3) done(AWAY);
      else done(null, { name: NAME, state: 'JOB_STATE_QUEUED' });
    },
  });
  const job = await client.createJob({ ...PHOTO, options: { iterations: 5 } });
  assert.deepEqual([job.name, job.state], [NAME, 'queued']);
  assert.equal(requests.length, 3);
  assert.equal(new Set(requests.map((request) => request?.requestId)).size, 1);
  assert.match(requests[0]!.requestId, /^[0-9a-f-]{36}$/);
  assert.equal(requests[0]!.options?.iterations, 5);
});

test('jobs are got, listed page by page, changed, cancelled and deleted', async () => {
  const requests: any[] = [];
  const record = <Q, R>(answer: (request: Q) => R) =>
    reply<Q, R>((request) => (requests.push(request), answer(request)));
  const client = await connect({
    GetJob: record(({ name }) => ({
      name,
      state: 99 as never,
      result: { image: 'images/aa', stopReason: 99 as never },
    })),
    ListJobs: record(({ pageToken }) =>
      pageToken
        ? { jobs: [{ name: 'jobs/a' }] }
        : { jobs: [{ name: 'jobs/c' }, { name: 'jobs/b' }], nextPageToken: 'more' },
    ),
    UpdateJob: record(({ name }) => ({ name, state: 'JOB_STATE_PAUSED' as const })),
    CancelJob: record(({ name }) => ({ name, state: 'JOB_STATE_CANCELLED' as const })),
    DeleteJob: record(() => ({})),
  });
  const job: Job = await client.getJob(NAME);
  assert.deepEqual(
    [job.name, job.state, job.result?.image, job.result?.stopReason],
    [NAME, 'unspecified', 'images/aa', 'unspecified'],
  );
  const names: string[] = [];
  for await (const { name } of client.listJobs({ pageSize: 2, states: ['queued', 'paused'] })) names.push(name);
  assert.deepEqual(names, ['jobs/c', 'jobs/b', 'jobs/a']);
  const states = ['JOB_STATE_QUEUED', 'JOB_STATE_PAUSED'];
  assert.deepEqual(
    requests.slice(1).map((request) => [request.pageSize, request.pageToken, request.states]),
    [
      [2, '', states],
      [2, 'more', states],
    ],
  );
  assert.equal((await client.updateJob(NAME, { options: { styleWeight: 0 }, paused: false })).state, 'paused');
  await client.updateJob(NAME, { finish: true });
  const [change, finish] = requests.slice(3);
  assert.deepEqual([change.name, change.options.styleWeight, change.paused, change.finish], [NAME, 0, false, false]);
  assert.deepEqual([finish.options, finish.paused, finish.finish], [null, undefined, true]);
  assert.equal((await client.cancelJob(NAME)).state, 'cancelled');
  assert.equal(await client.deleteJob(NAME), undefined);
  const wrong = await rejection(client.updateJob(NAME, { options: { styleWeigth: 1 } } as never));
  assert.ok(wrong instanceof InvalidArgumentError && wrong.field === 'options.style_weigth');
});

const sha256 = (data: Uint8Array) => createHash('sha256').update(data).digest('hex');

/** A server that takes images; `fails` says with which error the n-th part is answered, `loses` that it is lost first. */
function library(fails: (part: number) => { error: object; lost?: boolean } | undefined = () => undefined) {
  const uploads = new Map<string, { sha256: string; data: Buffer; total: number }>();
  const images = new Map<string, Buffer>();
  const offsets: number[] = [];
  const progress = (name: string) => {
    const { sha256, data, total } = uploads.get(name)!;
    const image = images.has(`images/${sha256}`) ? `images/${sha256}` : '';
    return { name, totalBytes: total, receivedBytes: data.length, image };
  };
  const missing = richStatus(status.NOT_FOUND, 'there is no such upload');
  const script = {
    CreateUpload: reply(({ totalBytes, sha256 }) => {
      const name = `uploads/${uploads.size + 1}`;
      uploads.set(name, { sha256, data: Buffer.alloc(0), total: totalBytes });
      return progress(name);
    }),
    GetUpload: ({ request }, done) => (uploads.has(request.name) ? done(null, progress(request.name)) : done(missing)),
    WriteUpload({ request: { name, offset, data } }, done) {
      const upload = uploads.get(name);
      if (!upload) return done(missing);
      const failure = fails(offsets.push(offset));
      if (failure?.lost) return done(failure.error);
      if (offset > upload.data.length) return done({ code: status.OUT_OF_RANGE, details: 'a part is missing' });
      upload.data = Buffer.concat([upload.data.subarray(0, offset), data]);
      const answer = progress(name);
      if (upload.data.length === upload.total) {
        images.set((answer.image = `images/${upload.sha256}`), upload.data);
        uploads.delete(name);
      }
      if (failure) done(failure.error);
      else done(null, answer);
    },
    GetImage: reply(({ name }) => ({ name, totalBytes: images.get(name)!.length, mediaType: 'image/png' })),
  } satisfies Script;
  return { script, images, offsets, uploads };
}

const MIB = 1 << 20;

test('an image goes up in parts, and once only', async () => {
  const { script, images, offsets } = library();
  const client = await connect(script);
  const file = randomBytes(2.5 * MIB);
  const stored = await client.uploadImage(file);
  assert.deepEqual(
    [stored.name, stored.totalBytes, stored.mediaType],
    [`images/${sha256(file)}`, file.length, 'image/png'],
  );
  assert.deepEqual(offsets, [0, MIB, 2 * MIB]);
  assert.ok(images.get(stored.name)!.equals(file));
  await client.uploadImage(file);
  assert.equal(offsets.length, 3);
});

test('an upload that is interrupted goes on where it was', async () => {
  const gone = { code: status.UNAVAILABLE, details: 'gone' };
  const interruptions: Record<string, [(part: number) => { error: object; lost?: boolean } | undefined, number[]]> = {
    'a part is lost': [(part) => (part === 2 ? { error: gone, lost: true } : undefined), [0, MIB, MIB, 2 * MIB]],
    'an answer is lost': [(part) => (part === 2 ? { error: gone } : undefined), [0, MIB, 2 * MIB]],
    'the last answer is lost': [(part) => (part === 3 ? { error: gone } : undefined), [0, MIB, 2 * MIB]],
    'the server lost a part': [
      (part) => (part === 2 ? { error: { code: status.OUT_OF_RANGE, details: '' }, lost: true } : undefined),
      [0, MIB, MIB, 2 * MIB],
    ],
  };
  const file = randomBytes(2.5 * MIB);
  for (const [what, [fails, expected]] of Object.entries(interruptions)) {
    const { script, images, offsets } = library(fails);
    const client = await connect(script);
    const { name } = await client.uploadImage(file);
    assert.deepEqual(offsets, expected, what);
    assert.ok(images.get(name)!.equals(file), what);
  }
});

test('an upload whose parts are all there and whose image is not is completed by the last byte', async () => {
  const { script, images, uploads, offsets } = library((part) => {
    if (part !== 1) return undefined;
    uploads.get('uploads/1')!.data = file;
    return { error: AWAY, lost: true };
  });
  const file = randomBytes(1000);
  const client = await connect(script);
  const { name } = await client.uploadImage(file);
  assert.deepEqual(offsets, [0, 999]);
  assert.ok(images.get(name)!.equals(file));
});

test('what the server refuses to take is an error', async () => {
  const error = richStatus(status.INVALID_ARGUMENT, 'data is no image');
  const client = await connect(library(() => ({ error })).script);
  assert.ok((await rejection(client.uploadImage(Buffer.from('text')))) instanceof InvalidArgumentError);
  assert.ok((await rejection(client.uploadImage('/no/such/file'))) instanceof InvalidArgumentError);
});

test('an image comes down in parts, goes on after an interruption, and is checked', async () => {
  const file = randomBytes(5 * MIB);
  const name = `images/${sha256(file)}`;
  const offsets: number[] = [];
  const cut = parts(file, 2 * MIB);
  const client = await connect({
    DownloadImage(call) {
      offsets.push(call.request.offset);
      const [next] = cut.filter(({ offset }) => Number(offset) >= call.request.offset);
      call.write(next!);
      if (next !== cut.at(-1)) call.emit('error', AWAY);
      else call.end();
    },
    GetImage: (_call, done) => done(richStatus(status.NOT_FOUND, 'there is none')),
  });
  const image = await client.downloadImage(name);
  assert.ok(image.data.equals(file));
  assert.deepEqual([image.format, image.width, image.height], ['png', 40, 30]);
  assert.deepEqual(offsets, [0, 2 * MIB, 4 * MIB]);
  assert.ok((await rejection(client.getImage(name))) instanceof NotFoundError);
});

test('a download that is damaged, incomplete or another image is a BrokenStreamError', async () => {
  const file = randomBytes(1000);
  const [first, second] = parts(file, 600) as [any, any];
  const damaged = Buffer.from(second.data);
  damaged[7]! ^= 1;
  const other = parts(randomBytes(10));
  for (const [sent, message] of [
    [[first, { ...second, data: damaged }], /has the SHA-256/],
    [[first], /ended after 600 of 1000 bytes/],
    [[second], /has a part at 600 where 0 was due/],
    [[], /came without its data/],
    [other, /^images\/.* arrived as a file with the SHA-256/],
  ] as [any[], RegExp][]) {
    const client = await connect({
      DownloadImage(call) {
        for (const part of sent) call.write(part);
        call.end();
      },
    });
    const error = await rejection(client.downloadImage(`images/${sha256(file)}`));
    assert.ok(error instanceof BrokenStreamError, String(error));
    assert.match(error.message, message);
  }
});

test('images on the server are named wherever an image can be given', async () => {
  const { script, asked } = inTurn(toTheEnd);
  const client = await connect(script);
  const stored = { name: 'images/aa', totalBytes: 9, width: 1, height: 1, mediaType: 'image/png' };
  const styles = [stored, { image: stored, weight: 2, region: { name: 'images/bb' } }, { style: 'styles/waves' }];
  await client.stylize({ content: stored, styles, initImage: { name: 'images/cc' } }).result();
  const { content, initImage, styles: sent } = asked.stylize[0]!;
  assert.deepEqual([content?.name, initImage?.name], ['images/aa', 'images/cc']);
  assert.deepEqual(
    sent.map(({ image, region, style, weight }) => [image?.name, region?.name, style, weight]),
    [
      ['images/aa', undefined, undefined, undefined],
      ['images/aa', 'images/bb', undefined, 2],
      [undefined, undefined, 'styles/waves', undefined],
    ],
  );
  const wrong = await rejection(client.createJob({ ...PHOTO, content: { name: 'styles/waves' } }));
  assert.ok(wrong instanceof InvalidArgumentError && wrong.field === 'content');
});

test('images too large for one request are uploaded first, each once; smaller ones travel with it', async () => {
  const { script: jobs, asked } = inTurn(toTheEnd, toTheEnd);
  const { script, images, uploads } = library();
  const created: (StylizeRequest | null)[] = [];
  const client = await connect({
    ...script,
    ...jobs,
    CreateJob: reply(({ request }) => (created.push(request), { name: NAME })),
  });
  const [large, other] = [randomBytes(13 * MIB), randomBytes(11 * MIB)];
  const request = { content: large, styles: [{ image: other, region: other }] };
  await client.stylize(request).result();
  await client.stylize({ content: other, styles: [other] }).result();
  const sources = ({ content, styles: [style] }: StylizeRequest) =>
    [content, style!.image, style!.region].map((image: Image | null | undefined) => image?.name ?? image?.data?.length);
  assert.deepEqual(asked.stylize.map(sources), [
    [`images/${sha256(large)}`, `images/${sha256(other)}`, `images/${sha256(other)}`],
    [other.length, other.length, undefined],
  ]);
  assert.equal(images.size, 2);
  await client.createJob(request);
  assert.deepEqual(
    created.map((sent) => sources(sent!)),
    [sources(asked.stylize[0]!)],
  );
  assert.ok(
    [...uploads.values()].every(({ data }) => data.length === 0),
    'nothing is sent twice',
  );
});

/** The parts of a file that the server made, as it cuts it. */
function fileParts(data: Buffer, offset = 0, size = 2 * MIB): FilePart__Input[] {
  const whole = { totalBytes: data.length, sha256: sha256(data), fileName: 'tiny-closure.onnx' };
  const cut: FilePart__Input[] = [];
  do cut.push({ ...whole, offset, data: data.subarray(offset, offset + size) });
  while ((offset += size) < data.length);
  return cut;
}

test('a model comes as a file in parts, after signs of life, and goes on after an interruption', async () => {
  const file = randomBytes(5 * MIB);
  const asked: ExportModelRequest[] = [];
  const told: [number, number | undefined][] = [];
  const client = await connect({
    ExportModel(call) {
      asked.push(call.request);
      call.write({});
      const [next] = fileParts(file, call.request.offset);
      call.write(next!);
      if (Number(next!.offset) + next!.data!.length < file.length) call.emit('error', AWAY);
      else call.end();
    },
  });
  const request = {
    model: 'tiny',
    graph: 'closure',
    format: 'onnx',
    precision: 'fp16',
    contentLayers: ['relu3_1'],
    styleLayers: ['relu1_1', 'relu2_1'],
    pooling: 'average',
    padding: 'zeros',
  } as const;
  const onProgress = (received: number, total: number | undefined) => void told.push([received, total]);
  const exported = await client.exportModel(request, { onProgress });
  assert.ok(exported.data.equals(file));
  assert.deepEqual([exported.name, exported.sha256], ['tiny-closure.onnx', sha256(file)]);
  assert.deepEqual(
    asked.map(({ offset, sha256: named }) => [offset, named]),
    [
      [0, ''],
      [2 * MIB, sha256(file)],
      [4 * MIB, sha256(file)],
    ],
  );
  const { model, graph, format, precision, contentLayers, styleLayers, pooling, padding } = asked[0]!;
  assert.deepEqual([model, graph, format], ['tiny', 'EXPORT_GRAPH_CLOSURE', 'EXPORT_FORMAT_ONNX']);
  assert.deepEqual([contentLayers, styleLayers], [['relu3_1'], ['relu1_1', 'relu2_1']]);
  assert.deepEqual([precision, pooling, padding], ['EXPORT_PRECISION_FP16', 'POOLING_AVERAGE', 'PADDING_ZEROS']);
  assert.deepEqual(told.slice(0, 3), [
    [0, undefined],
    [2 * MIB, file.length],
    [2 * MIB, file.length],
  ]);
  assert.deepEqual(told.at(-1), [file.length, file.length]);
});

test('a server that came back with another file sends it from its start', async () => {
  const [before, after] = [randomBytes(3 * MIB), randomBytes(MIB)];
  let calls = 0;
  const client = await connect({
    ExportModel(call) {
      if (calls++) for (const part of fileParts(after)) call.write(part);
      else call.write(fileParts(before)[0]!);
      if (calls === 1) call.emit('error', AWAY);
      else call.end();
    },
  });
  const { data, sha256: named } = await client.exportModel();
  assert.ok(data.equals(after));
  assert.equal(named, sha256(after));
});

test('a file that is damaged or incomplete is a BrokenStreamError', async () => {
  const file = randomBytes(1000);
  const [first, second] = fileParts(file, 0, 600) as [any, any];
  for (const [sent, message] of [
    [[first, { ...second, data: Buffer.alloc(400) }], /^tiny-closure.onnx has the SHA-256/],
    [[first], /has 600 bytes, not 1000/],
    [[second], /has a part at 600 where 0 was due/],
    [[first, { ...second, sha256: 'ab' }], /has a part at 600 where 600 was due/],
    [[{}], /came without its data/],
  ] as [any[], RegExp][]) {
    const client = await connect({
      ExportModel(call) {
        for (const part of sent) call.write(part);
        call.end();
      },
    });
    const error = await rejection(client.exportModel());
    assert.ok(error instanceof BrokenStreamError, String(error));
    assert.match(error.message, message);
  }
});

test('a style is exported and imported as a file', async () => {
  const asked: any[] = [];
  const file = Buffer.from('moments');
  const client = await connect({
    ExportStyle(call) {
      asked.push(call.request);
      for (const part of fileParts(file)) call.write(part);
      call.end();
    },
    ImportStyle: (call, done) => {
      asked.push(call.request);
      done(null, { name: 'styles/sea', file: { model: 'models/tiny', pooling: 'POOLING_MAX', sizesPx: [256] } });
    },
  });
  const exported = await client.exportStyle('sea', { model: 'tiny', options: { sizePx: 256, preset: 'gatys' } });
  assert.ok(exported.data.equals(file));
  const { name, model, options } = asked[0];
  assert.deepEqual([name, model, options.sizePx, options.preset], ['sea', 'tiny', 256, 'PRESET_GATYS']);

  const style = await client.importStyle(exported.data, { id: 'sea', displayName: 'The sea' });
  assert.ok(asked[1].data.equals(file));
  assert.deepEqual([asked[1].styleId, asked[1].displayName], ['sea', 'The sea']);
  assert.deepEqual([style.file?.pooling, style.file?.sizesPx], ['max', [256]]);
  const missing = await rejection(client.importStyle('/no/such/file'));
  assert.ok(missing instanceof InvalidArgumentError && missing.field === 'data');
});

test('an export that is aborted ends the call', async () => {
  let left!: () => void;
  const gone = new Promise<void>((resolve) => (left = resolve));
  const client = await connect({
    ExportModel(call) {
      call.write({});
      call.on('cancelled', left);
    },
  });
  const stop = new AbortController();
  const options = { signal: stop.signal, onProgress: () => stop.abort() };
  assert.ok((await rejection(client.exportModel({}, options))) instanceof CancelledError);
  await gone;
});
