// The client against a real server: NST_TEST_SERVER=localhost:50051 npm run test:e2e
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { after, before, test } from 'node:test';
import { crc32, deflateSync, inflateSync } from 'node:zlib';
import { setTimeout as sleep } from 'node:timers/promises';
import {
  AlreadyExistsError,
  CancelledError,
  FailedPreconditionError,
  InvalidArgumentError,
  NotFoundError,
  NstClient,
  type Job,
  type OptionDescription,
  type StylizeEvent,
} from '@nst/client';
import { Wire } from './scripted_server.js';

const address = process.env['NST_TEST_SERVER'];
assert.ok(address, 'NST_TEST_SERVER must name a running nst-server, for instance localhost:50051');

const options = { sizePx: 64, iterations: 5 };
const deadlineMs = 240_000;
let client: NstClient;

before(() => {
  client = new NstClient(address);
});

after(() => client.close());

function chunk(type: string, data: Buffer): Buffer {
  const body = Buffer.concat([Buffer.from(type), data]);
  const [length, checksum] = [Buffer.alloc(4), Buffer.alloc(4)];
  length.writeUInt32BE(data.length);
  checksum.writeUInt32BE(crc32(body));
  return Buffer.concat([length, body, checksum]);
}

/** An RGB PNG file of `color(x, y)`. */
function png(width: number, height: number, color: (x: number, y: number) => [number, number, number]): Buffer {
  const header = Buffer.alloc(13);
  header.writeUInt32BE(width, 0);
  header.writeUInt32BE(height, 4);
  header.set([8, 2], 8);
  const rows = Array.from({ length: height }, (_, y) =>
    Buffer.from([0, ...Array.from({ length: width }, (_, x) => color(x, y)).flat()]),
  );
  return Buffer.concat([
    Buffer.from('\x89PNG\r\n\x1a\n', 'latin1'),
    chunk('IHDR', header),
    chunk('IDAT', deflateSync(Buffer.concat(rows))),
    chunk('IEND', Buffer.alloc(0)),
  ]);
}

/** Width, height and bytes a row of a PNG file, whose checksums and compressed data are checked. */
function readPng(file: Buffer): { width: number; height: number; bytesPerRow: number } {
  assert.equal(file.toString('latin1', 0, 8), '\x89PNG\r\n\x1a\n');
  const data: Buffer[] = [];
  let header: Buffer = Buffer.alloc(0);
  for (let at = 8; at < file.length;) {
    const length = file.readUInt32BE(at);
    const body = file.subarray(at + 4, at + 8 + length);
    assert.equal(file.readUInt32BE(at + 8 + length), crc32(body));
    const type = body.toString('latin1', 0, 4);
    if (type === 'IHDR') header = body.subarray(4);
    if (type === 'IDAT') data.push(body.subarray(4));
    at += 12 + length;
  }
  const [width, height] = [header.readUInt32BE(0), header.readUInt32BE(4)];
  return { width, height, bytesPerRow: inflateSync(Buffer.concat(data)).length / height };
}

const photo = png(96, 72, (x, y) => [(x * 5) % 256, (y * 7) % 256, ((x >> 3) + (y >> 3)) % 2 ? 200 : 40]);
const stripes = png(64, 64, (x, y) => ((x + y) % 12 < 6 ? [230, 60, 20] : [20, 40, 160]));
const checks = png(64, 64, (x, y) => (((x >> 2) + (y >> 2)) % 2 ? [250, 220, 40] : [10, 120, 90]));

async function rejection(promise: Promise<unknown>): Promise<Error> {
  return promise.then(
    () => assert.fail('it did not throw'),
    (error: Error) => error,
  );
}

test('the server names its models, exactly one of them the default and first', async () => {
  const models = await client.listModels();
  assert.equal(models[0]?.isDefault, true);
  assert.equal(models.filter(({ isDefault }) => isDefault).length, 1);
  for (const { name, layers } of models) {
    assert.match(name, /^models\//);
    assert.ok(layers.length > 0);
  }
});

test('the server describes every option', async () => {
  const described = new Map((await client.describeOptions()).map((option) => [option.key, option]));
  const size = described.get('sizePx');
  assert.equal(size?.name, 'size_px');
  assert.equal(size?.type, 'integer');
  assert.ok(typeof size?.defaultValue === 'number' && size.minimum! <= size.defaultValue && size.unit === 'px');
  assert.deepEqual(described.get('init')?.choices, ['content', 'noise', 'gray', 'style_statistics', 'image']);
  assert.equal(typeof described.get('styleLayers')?.defaultValue, 'object');
});

test('a picture is made: snapshot, running, every iteration, result, succeeded, numbered without gaps', async () => {
  const all: StylizeEvent[] = [];
  const request = { content: photo, styles: [stripes], options, preview: { interval: 1 } };
  for await (const event of client.stylize(request, { deadlineMs })) all.push(event);

  const first = all[0];
  assert.ok(first?.kind === 'snapshot');
  assert.match(first.job.name, /^jobs\//);
  assert.equal(first.job.options?.iterations, 5);
  const last = all.at(-1);
  assert.ok(last?.kind === 'stateChange');
  assert.equal(last.job.state, 'succeeded');
  assert.ok(all.some((event) => event.kind === 'stateChange' && event.job.state === 'running'));

  const iterations = all.flatMap((event) => (event.kind === 'progress' ? [event.iteration] : []));
  assert.deepEqual(iterations, [0, 1, 2, 3, 4, 5]);
  const frames = all.filter((event) => event.kind === 'frame');
  assert.ok(frames.length >= 1);
  assert.ok(frames.length + frames.reduce((sum, { skipped }) => sum + skipped, 0) <= 6);
  for (const { image } of frames) {
    assert.equal(image.format, 'jpeg');
    assert.deepEqual([...image.data.subarray(0, 2)], [0xff, 0xd8]);
  }

  const results = all.filter((event) => event.kind === 'result');
  assert.equal(results.length, 1);
  const { image, stopReason, loss } = results[0]!;
  assert.equal(all.indexOf(results[0]!), all.length - 2);
  assert.deepEqual([image.format, image.width, image.height, stopReason], ['png', 64, 48, 'iterations']);
  assert.ok(loss > 0);
  assert.deepEqual(readPng(image.data), { width: 64, height: 48, bytesPerRow: 1 + 3 * 64 });

  let sequence = first.sequence;
  for (const event of all.slice(1)) {
    if (event.kind !== 'frame') sequence += 1;
    assert.equal(event.sequence, sequence, `${event.kind} has number ${event.sequence}, not ${sequence}`);
    assert.equal(event.attempt, 1);
  }
});

test('what is out of range is refused with the name of the field', async () => {
  const wrong = { ...options, iterations: 0 };
  const error = await rejection(client.stylize({ content: photo, styles: [stripes], options: wrong }).result());
  assert.ok(error instanceof InvalidArgumentError, String(error));
  assert.equal(error.field, 'options.iterations');
  assert.match(error.message, /iterations.*0/);
});

test('a model and a style that do not exist are NotFoundErrors', async () => {
  const request = { content: photo, styles: [stripes], options };
  const noModel = await rejection(client.stylize({ ...request, model: 'models/no-such' }).result());
  assert.ok(noModel instanceof NotFoundError, String(noModel));
  const noStyle = await rejection(client.stylize({ ...request, styles: [{ style: 'styles/no-such' }] }).result());
  assert.ok(noStyle instanceof NotFoundError, String(noStyle));
});

test('a job is cancelled by the signal, and the server takes the next one', async () => {
  const stop = new AbortController();
  const request = { content: photo, styles: [stripes], options: { ...options, iterations: 10_000 } };
  const iterations: number[] = [];
  const error = await rejection(
    (async () => {
      for await (const event of client.stylize(request, { signal: stop.signal, deadlineMs })) {
        if (event.kind !== 'progress') continue;
        iterations.push(event.iteration);
        stop.abort();
      }
    })(),
  );
  assert.ok(error instanceof CancelledError, String(error));
  assert.deepEqual(iterations, [0]);
  await client.stylize({ content: photo, styles: [stripes], options }, { deadlineMs: 60_000 }).result();
});

test('a style is created, found, listed, used and deleted', async () => {
  const id = `node-test-${process.pid}-${Date.now()}`;
  const images = [stripes, { image: checks, weight: 0.5 }];
  const created = await client.createStyle({ images, id, displayName: 'Stripes and checks' });
  assert.equal(created.name, `styles/${id}`);
  try {
    const style = await client.getStyle(created.name);
    assert.equal(style.displayName, 'Stripes and checks');
    const [first, second] = style.images;
    assert.deepEqual([first?.width, first?.height, style.images.length], [64, 64, 2]);
    assert.ok(Math.abs(first!.weight! / second!.weight! - 2) < 1e-6, 'the weights are 1 and 0.5, or their shares');
    const names: string[] = [];
    for await (const { name } of client.listStyles({ pageSize: 1 })) names.push(name);
    assert.ok(names.includes(created.name));
    const styles = [{ style: created.name, weight: 2 }, checks];
    const output = { format: 'jpeg' } as const;
    const { image } = await client.stylize({ content: photo, styles, options, output }, { deadlineMs }).result();
    assert.deepEqual([image.format, image.width, image.height], ['jpeg', 64, 48]);
  } finally {
    await client.deleteStyle(created.name);
  }
  assert.ok((await rejection(client.getStyle(created.name))) instanceof NotFoundError);
});

test('a style travels as a file, and makes the same picture', async () => {
  const id = `node-file-${process.pid}-${Date.now()}`;
  const small = { ...options, precision: 'fp32' } as const;
  const original = await client.createStyle({ images: [stripes, checks], id });
  const { data, name } = await client.exportStyle(original.name, { options: small });
  assert.equal(name, `${id}.style.safetensors`);
  const imported = await client.importStyle(data, { id: `${id}-again`, displayName: 'Brought along' });
  try {
    assert.deepEqual([imported.displayName, imported.images.length], ['Brought along', 0]);
    assert.equal(imported.file?.sizesPx.at(-1), options.sizePx);
    assert.deepEqual(
      imported.file?.images.map(({ sha256 }) => sha256),
      original.images.map(({ sha256 }) => sha256),
    );
    const [first, second] = await Promise.all(
      [original, imported].map(({ name: style }) =>
        client.stylize({ content: photo, styles: [{ style }], options: small }, { deadlineMs }).result(),
      ),
    );
    assert.equal(second!.loss, first!.loss);
    const large = { ...small, sizePx: 96 };
    const refused = await rejection(
      client.stylize({ content: photo, styles: [{ style: imported.name }], options: large }).result(),
    );
    assert.ok(refused instanceof InvalidArgumentError && refused.field === 'options.size_px');
  } finally {
    await client.deleteStyle(original.name);
    await client.deleteStyle(imported.name);
  }
});

test('a model is exported for another runtime', async () => {
  const exported = await client.exportModel({ graph: 'features', format: 'torchscript' }, { deadlineMs });
  assert.match(exported.name, /features.*\.pt$/);
  assert.ok(exported.data.includes('nst.json'));
  const again = await client.exportModel({ graph: 'features', format: 'torchscript' }, { deadlineMs });
  assert.equal(again.sha256, exported.sha256);
  const wrong = await rejection(client.exportModel({ layers: ['relu9_9'], graph: 'features' }));
  assert.ok(wrong instanceof InvalidArgumentError && wrong.field === 'layers[relu9_9]');
});

/** A value of an option that is not its default. */
function another({ key, type, defaultValue, choices, minimum, maximum }: OptionDescription): unknown {
  if (type === 'choice') return choices.filter((choice) => choice !== defaultValue && choice !== 'image')[0];
  if (type === 'boolean') return !defaultValue;
  if (type === 'layer_weights') return { relu2_1: 0.5, relu3_1: 2 };
  if (type === 'integers') return [3, 2];
  if (key === 'sizePx') return 96; // two scales, for two budgets
  if (key === 'firstSizePx') return 64;
  const value = type === 'integer' ? Number(defaultValue) + 1 : Number(defaultValue) * 0.75 || 0.25;
  assert.ok(value >= minimum! && value <= maximum!, `${key}: ${value} is not from ${minimum} to ${maximum}`);
  return value;
}

test('every option that the server describes arrives there as it was given', async () => {
  const described = await client.describeOptions();
  const given = Object.fromEntries(described.map((option) => [option.key, another(option)]));
  const { name, options: arrived } = await client.createJob({ content: photo, styles: [stripes], options: given });
  await client.deleteJob(name);
  for (const { key } of described) assert.deepEqual(arrived?.[key], given[key], key);
  assert.equal(Object.keys(arrived!).length, described.length);
});

test('a connection cut again and again loses nothing: every event once, and the same picture', async () => {
  const request = { content: photo, styles: [stripes], options: { ...options, iterations: 60, seed: 1 } };
  const expected = await client.stylize(request, { deadlineMs }).result();

  const wire = await Wire.to(address);
  const shaky = new NstClient(wire.address);
  try {
    const all: StylizeEvent[] = [];
    let cuts = 0;
    for await (const event of shaky.stylize(request, { deadlineMs })) {
      all.push(event);
      const due = event.kind === 'progress' && event.iteration % 12 === 5;
      if (due || event.kind === 'result') {
        wire.cut();
        cuts += 1;
      }
    }
    assert.equal(cuts, 6);
    assert.ok(wire.connections >= 4, `there were ${wire.connections} connections`);
    const durable = all.filter(({ kind }) => kind !== 'snapshot' && kind !== 'frame');
    const last = durable.at(-1)!;
    assert.deepEqual(
      durable.map(({ sequence }) => sequence),
      Array.from({ length: last.sequence }, (_, index) => index + 1),
    );
    assert.equal(all.filter(({ kind }) => kind === 'snapshot').length, 1);
    const iterations = all.flatMap((event) => (event.kind === 'progress' ? [event.iteration] : []));
    assert.deepEqual(
      iterations,
      Array.from({ length: 61 }, (_, index) => index),
    );
    const [result] = all.filter((event) => event.kind === 'result');
    assert.equal(result?.image.sha256, expected.image.sha256);
  } finally {
    shaky.close();
    wire.close();
  }
});

/** A job when it is as wanted. */
async function becomes(name: string, wanted: (job: Job) => boolean): Promise<Job> {
  for (const until = Date.now() + 60_000; Date.now() < until; await sleep(50)) {
    const job = await client.getJob(name);
    if (wanted(job)) return job;
  }
  return assert.fail(`${name} did not become what was wanted: ${JSON.stringify(await client.getJob(name))}`);
}

test('a job is created once, listed, watched, steered, paused, resumed, finished, and deleted', async () => {
  const requestId = `node-test-${process.pid}-${Date.now()}`;
  const request = { content: photo, styles: [stripes], options: { ...options, iterations: 10_000 }, requestId };
  const { name } = await client.createJob(request);
  assert.equal((await client.createJob(request)).name, name);
  const other = await rejection(client.createJob({ ...request, content: stripes }));
  assert.ok(other instanceof AlreadyExistsError, String(other));
  const running: string[] = [];
  for await (const job of client.listJobs({ pageSize: 1, states: ['queued', 'running'] })) running.push(job.name);
  assert.ok(running.includes(name));

  for await (const event of client.watchJob(name)) if (event.kind === 'progress') break;
  assert.equal((await client.updateJob(name, { options: { styleWeight: 7 } })).name, name);
  await becomes(name, (job) => job.options?.styleWeight === 7);
  await client.updateJob(name, { paused: true });
  const paused = await becomes(name, ({ state }) => state === 'paused');
  await client.updateJob(name, { paused: false });
  const resumed = await becomes(name, ({ attempt, state }) => state === 'running' && attempt > paused.attempt);
  await client.updateJob(name, { finish: true });

  const { image, stopReason } = await client.watchJob(name, { afterSequence: resumed.sequence }).result();
  assert.equal(stopReason, 'finished');
  const ended = await client.getJob(name);
  assert.deepEqual([ended.state, ended.result?.image], ['succeeded', `images/${image.sha256}`]);
  assert.equal((await client.watchJob(name).result()).image.sha256, image.sha256);
  const late = await rejection(client.updateJob(name, { finish: true }));
  assert.ok(late instanceof FailedPreconditionError, String(late));

  const stored = await client.getImage(ended.result!.image);
  assert.deepEqual([stored.width, stored.height, stored.mediaType], [64, 48, 'image/png']);
  assert.ok((await client.downloadImage(stored.name)).data.equals(image.data));
  const next = { content: stored, styles: [{ name: ended.result!.image }], initImage: stored, options };
  assert.equal((await client.stylize(next, { deadlineMs }).result()).image.width, 64);
  await client.deleteJob(name);
  assert.ok((await rejection(client.getJob(name))) instanceof NotFoundError);
});

test('leaving the loop cancels the job, detaching does not, cancelling early does', async () => {
  const request = { content: photo, styles: [stripes], options: { ...options, iterations: 10_000 } };
  const left = client.stylize(request, { deadlineMs });
  for await (const event of left) if (event.kind === 'progress') break;
  await becomes(left.job!.name, ({ state }) => state === 'cancelled');

  const detached = client.stylize(request, { deadlineMs });
  let seen = 0;
  for await (const event of detached) {
    if (event.kind !== 'progress') continue;
    seen = event.iteration;
    detached.detach();
  }
  const { name } = detached.job!;
  await becomes(name, ({ progress }) => progress !== undefined && progress.iteration > seen + 3);
  assert.equal((await client.cancelJob(name)).state, 'cancelled');

  // Wherever on its way the request is.
  for (const ms of [0, 5, 40]) {
    const requestId = `node-early-${process.pid}-${Date.now()}`;
    const early = client.stylize({ ...request, requestId });
    const loop = rejection(early.result());
    await sleep(ms);
    await early.cancel();
    assert.ok((await loop) instanceof CancelledError);
    for await (const job of client.listJobs()) {
      if (job.requestId === requestId) assert.equal(job.state, 'cancelled');
    }
  }
});

/** An RGB BMP file of noise; `width` must be a multiple of 4. */
function bmp(width: number, height: number): Buffer {
  const pixels = randomBytes(3 * width * height);
  const header = Buffer.alloc(54);
  header.write('BM');
  for (const [at, value] of [
    [2, 54 + pixels.length],
    [10, 54],
    [14, 40],
    [18, width],
    [22, height],
    [34, pixels.length],
  ] as const) {
    header.writeUInt32LE(value, at);
  }
  header.writeUInt16LE(1, 26);
  header.writeUInt16LE(24, 28);
  return Buffer.concat([header, pixels]);
}

test('an image too large for one request is uploaded through a connection that is cut, and used', async () => {
  const large = bmp(3000, 2900);
  assert.ok(large.length > 24 << 20);
  const wire = await Wire.to(address);
  const shaky = new NstClient(wire.address);
  try {
    await shaky.listModels();
    const cuts = [20, 90, 400].map((ms) => setTimeout(() => wire.cut(), ms));
    const { image } = await shaky.stylize({ content: large, styles: [stripes], options }, { deadlineMs }).result();
    assert.deepEqual([image.width, image.height], [64, 62]);
    cuts.forEach(clearTimeout);
    assert.ok(wire.connections >= 3, `there were ${wire.connections} connections`);
    const stored = await shaky.uploadImage(large);
    assert.deepEqual([stored.totalBytes, stored.width, stored.height], [large.length, 3000, 2900]);
    const cut = setTimeout(() => wire.cut(), 30);
    assert.ok((await shaky.downloadImage(stored.name)).data.equals(large));
    clearTimeout(cut);
  } finally {
    shaky.close();
    wire.close();
  }
});
