import assert from 'node:assert/strict';
import { createReadStream } from 'node:fs';
import { readFile, stat, writeFile, mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { extname, join } from 'node:path';
import { after, before, test } from 'node:test';
import { chromium } from 'playwright-core';
import sharp from 'sharp';
import { GRAPHS } from '../graphs.mjs';
import { MODELS, PICTURES, given } from './inputs.mjs';

const SAMPLES = join(import.meta.dirname, '..', '..', '..');
const PHOTO = join(PICTURES, 'photo.png');
const TYPES = {
  '.html': 'text/html',
  '.mjs': 'text/javascript',
  '.js': 'text/javascript',
  '.css': 'text/css',
  '.wasm': 'application/wasm',
};
const QUIET = ['--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update'];

/** @type {import('playwright-core').Browser} */
let browser;
/** @type {import('playwright-core').Page} */
let page;
/** @type {string} */
let folder;
/** @type {string[]} what the page should not have said */
const complaints = [];

// The folder samples, as any static server would serve it, but with the models of the tests.
const server = createServer(async ({ url = '/' }, response) => {
  const path = new URL(url, 'http://localhost').pathname.replace(/\/$/, '/index.html');
  const model = path.match(/^\/portable\/models\/(\w+\.onnx)$/)?.[1];
  const file = model ? join(MODELS, model) : join(SAMPLES, path);
  const found = await stat(file).catch(() => null);
  if (!found) return void response.writeHead(404).end();
  const type = /** @type {Record<string, string>} */ (TYPES)[extname(file)] ?? 'application/octet-stream';
  response.writeHead(200, { 'content-type': type, 'content-length': found.size });
  createReadStream(file).pipe(response);
});

before(async () => {
  folder = await mkdtemp(join(tmpdir(), 'nst-page-'));
  await new Promise((listening) => server.listen(0, '127.0.0.1', () => listening(null)));
  const args = ['--no-sandbox', '--disable-gpu', '--disable-sync', ...QUIET];
  browser = await chromium.launch({ executablePath: given('NST_TEST_CHROMIUM'), args });
  page = await browser.newPage();
  page.on('pageerror', (error) => complaints.push(error.message));
  page.on('console', (message) => message.type() === 'error' && complaints.push(message.text()));
  await open();
});

after(async () => {
  await browser.close();
  server.close();
  await rm(folder, { recursive: true });
});

async function open() {
  const { port } = /** @type {import('node:net').AddressInfo} */ (server.address());
  await page.goto(`http://127.0.0.1:${port}/portable/web/`);
  await page.waitForSelector('html[data-ready]');
}

/** @param {number} iterations */
async function start(iterations) {
  await page.setInputFiles('#photo', PHOTO);
  await page.selectOption('#size', '128');
  await page.fill('#iterations', String(iterations));
  await page.click('#start');
}

/** @param {number} iteration */
const reached = (iteration) =>
  page.waitForFunction(
    (wanted) => document.getElementById('details')?.textContent?.startsWith(wanted),
    `iteration ${iteration} `,
  );

const loss = async () => Number(await page.textContent('#loss'));

/** Returns the picture as the visitor downloads it. */
async function downloaded() {
  const [download] = await Promise.all([page.waitForEvent('download'), page.click('#download')]);
  const path = join(folder, download.suggestedFilename());
  await download.saveAs(path);
  return sharp(await readFile(path))
    .removeAlpha()
    .raw()
    .toBuffer({ resolveWithObject: true });
}

test('a static server is enough for WebAssembly to have threads', async () => {
  assert.equal(await page.evaluate(() => crossOriginIsolated), true);
});

test('a run can be stopped at any time, and leaves its picture', async () => {
  await start(400);
  await reached(1);
  await page.click('#stop');
  assert.equal(await page.textContent('#status'), 'Stopped.');
  assert.ok(await page.isVisible('#download'));
  assert.ok(await page.isEnabled('#start'));
});

test('the picture changes, the loss falls, and the result can be saved', async () => {
  await start(3);
  await reached(0);
  const [first, before] = [await loss(), await downloaded()];
  await page.waitForFunction(() => document.getElementById('status')?.textContent === 'Done.');
  const [last, finished] = [await loss(), await downloaded()];
  assert.ok(last < 0.9 * first, `the loss went from ${first} to ${last}`);
  assert.deepEqual([finished.info.width, finished.info.height], [128, 85]);
  const changed = finished.data.reduce((total, value, i) => total + Math.abs(value - before.data[i]), 0);
  assert.ok(changed / finished.data.length > 2, 'the picture hardly changed');
  assert.equal(await page.locator('#chart polyline').count(), 1);
});

test('files that are no model are named at once', async () => {
  await page.setInputFiles('#models', PHOTO);
  await page.waitForSelector('#error:not([hidden])');
  assert.match(String(await page.textContent('#error')), /^photo\.png is not an ONNX file/);
  await page.setInputFiles('#models', join(MODELS, 'grams.onnx'));
  await page.waitForFunction(() => document.getElementById('error')?.textContent?.includes('missing'));
  assert.match(String(await page.textContent('#error')), /missing: features, closure/);
  await page.setInputFiles(
    '#models',
    GRAPHS.map((graph) => join(MODELS, `${graph}.onnx`)),
  );
  await page.waitForSelector('#error', { state: 'hidden' });
});

test('a photograph that is none is named', async () => {
  const path = join(folder, 'photo.jpg');
  await writeFile(path, 'not a picture');
  await page.setInputFiles('#photo', path);
  await page.click('#start');
  await page.waitForSelector('#error:not([hidden])');
  assert.match(String(await page.textContent('#error')), /photograph is in no format that this browser reads/);
  assert.ok(await page.isEnabled('#start'));
});

test('iterations out of range are refused by name', async () => {
  await start(0);
  assert.match(String(await page.textContent('#error')), /Iterations must be a whole number from 1 to 500, not 0/);
});

test('nothing else went wrong on the page', () => {
  assert.deepEqual(complaints, []);
});
