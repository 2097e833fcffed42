// What the README and the examples promise works when it is typed in.
import assert from 'node:assert/strict';
import { execFile, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { EventEmitter, once } from 'node:events';
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { described, recorded } from './described.js';
import { parts, reply, ScriptedServer, send, wholeJob, type JobCall } from './scripted_server.js';

const run = promisify(execFile);
const root = fileURLToPath(new URL('../..', import.meta.url));
// Inside the package, so that its own name resolves.
const programs = join(root, 'dist/test/readme');

let folder: string;
let server: ScriptedServer;
let job: (call: JobCall) => void | Promise<void>;
let created = 0;
const cancelled = new EventEmitter();

before(async () => {
  folder = await mkdtemp(join(tmpdir(), 'nst-'));
  await writeFile(join(folder, 'photo.jpg'), 'a photo');
  await writeFile(join(folder, 'style.jpg'), 'a style');
  await writeFile(join(folder, 'sky.png'), 'a mask');
  await writeFile(join(folder, 'picture.png'), described(JSON.stringify(recorded)).png!);
  await mkdir(programs, { recursive: true });
  const picture = Buffer.from('the picture');
  const stored = { name: `images/${createHash('sha256').update(picture).digest('hex')}`, totalBytes: picture.length };
  const ended = { name: 'jobs/1', state: 'JOB_STATE_SUCCEEDED' as const, result: { image: stored.name } };
  const sha256 = createHash('sha256').update(picture).digest('hex');
  const model = { data: picture, totalBytes: picture.length, sha256, fileName: 'closure.onnx' };
  server = await ScriptedServer.start({
    stylize: (call) => job(call),
    watch: (call) => job(call),
    CreateJob: reply(() => ({ name: `jobs/${++created}`, state: 'JOB_STATE_QUEUED' as const })),
    UpdateJob: reply(() => ended),
    ListJobs: reply(() => ({ jobs: [ended] })),
    CancelJob: reply(({ name }) => (cancelled.emit(name), ended)),
    CreateUpload: reply(() => ({ name: 'uploads/1', image: stored.name })),
    GetImage: reply(() => stored),
    DownloadImage(call) {
      for (const part of parts(picture)) call.write(part);
      call.end();
    },
    ExportModel: (call) => (call.write(model), call.end()),
    ExportStyle: (call) => (call.write(model), call.end()),
    ImportStyle: reply(() => ({ name: 'styles/waves-again' })),
  });
});

after(async () => {
  server.stop();
  await rm(folder, { recursive: true });
  await rm(programs, { recursive: true });
});

async function programsOfReadme(): Promise<string[]> {
  const readme = await readFile(join(root, 'README.md'), 'utf8');
  return [...readme.matchAll(/^```js\n(.*?)^```$/gms)].map(([, code]) => code!);
}

test('every program in the README runs', async () => {
  const sse = await readFile(join(root, 'examples/sse.mjs'), 'utf8');
  const all = await programsOfReadme();
  assert.ok(all.includes(sse), "the README's web app is not examples/sse.mjs");
  const rest = all.filter((code) => code !== sse);
  assert.ok(rest.length >= 9);
  job = (call) => wholeJob(call);
  for (const [index, code] of rest.entries()) {
    const program = join(programs, `${index}.mjs`);
    await writeFile(program, code.replaceAll(/NstClient\((?:'localhost:50051')?\)/g, `NstClient('${server.address}')`));
    await run(process.execPath, [program], { cwd: folder, timeout: 20_000 });
  }
  assert.equal(await readFile(join(folder, 'preview.jpg'), 'utf8'), 'frame 2');
  assert.equal(await readFile(join(folder, 'result.png'), 'utf8'), 'the picture');
  assert.equal(await readFile(join(folder, 'result.tiff'), 'utf8'), 'the picture');
  assert.equal(await readFile(join(folder, 'jobs-1.png'), 'utf8'), 'the picture');
  assert.equal(await readFile(join(folder, 'closure.onnx'), 'utf8'), 'the picture');
});

test('examples/stylize.mjs writes the frames and the result, and shows the progress', async () => {
  job = (call) => wholeJob(call, { iterations: 3 });
  const example = join(root, 'examples/stylize.mjs');
  const { stdout } = await run(process.execPath, [example, 'photo.jpg', 'style.jpg', '--server', server.address], {
    cwd: folder,
  });
  assert.match(stdout, /3\/3 {2}loss 2\.500/);
  assert.match(stdout, /out\/result\.png: 40×30, loss 1\.500/);
  assert.equal((await readdir(join(folder, 'out/frames'))).length, 4);
  assert.equal(await readFile(join(folder, 'out/result.png'), 'utf8'), 'the picture');
});

test('examples/stylize.mjs says in one line what went wrong', async () => {
  const example = join(root, 'examples/stylize.mjs');
  const failed = run(process.execPath, [example, 'photo.jpg', 'style.jpg', '--server', '127.0.0.1:1'], { cwd: folder });
  await assert.rejects(failed, (error: any) => {
    assert.equal(error.code, 1);
    assert.match(error.stderr, /^\nUnavailableError: the server at 127\.0\.0\.1:1 is not available.*\n$/);
    return true;
  });
});

test('examples/sse.mjs streams a picture to a page, goes on when that comes back, and cancels when it is closed', async () => {
  const example = join(programs, 'sse.mjs');
  const code = await readFile(join(root, 'examples/sse.mjs'), 'utf8');
  await writeFile(example, code.replace('graceMs = 5_000', 'graceMs = 300'));
  const web = spawn(process.execPath, [example, 'photo.jpg', 'style.jpg', server.address, '0'], { cwd: folder });
  try {
    const [printed] = await once(web.stdout, 'data');
    const address = String(printed).trim();
    assert.match(await (await fetch(address)).text(), /new EventSource\('\/events'\)/);

    job = (call) => wholeJob(call, { iterations: 1 });
    const stream = await (await fetch(`${address}/events`)).text();
    const names = [...stream.matchAll(/^event: (.*)$/gm)].map(([, name]) => name);
    assert.deepEqual(names, ['progress', 'picture', 'progress', 'picture', 'picture', 'end']);
    assert.match(stream, new RegExp(`^data: {"url":"data:image/png;base64,${btoa('the picture')}"}$`, 'm'));
    assert.match(stream, /^id: jobs\/\d+ 2\nevent: progress$/m);
    assert.match(stream, /event: end\ndata: "done"\n\n$/);

    let after: unknown;
    job = (call) => {
      after = 'afterSequence' in call.request && call.request.afterSequence;
      return wholeJob(call, { iterations: 1 });
    };
    await (await fetch(`${address}/events`, { headers: { 'last-event-id': 'jobs/1 3' } })).text();
    assert.equal(after, 3);

    const last = `jobs/${created + 1}`;
    let told = false;
    cancelled.on(last, () => (told = true));
    job = (call) => send(call, { progress: {} });
    const page = new AbortController();
    await (await fetch(`${address}/events`, { signal: page.signal })).body!.getReader().read();
    page.abort();
    await sleep(100);
    assert.equal(told, false, 'it may come back');
    await once(cancelled, last);
  } finally {
    web.kill();
  }
});
