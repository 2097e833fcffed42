import assert from 'node:assert/strict';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { chromium } from 'playwright-core';
import sharp from 'sharp';
import { GRAPHS } from '../graphs.mjs';
import { CHROMIUM_FLAGS, serve } from './browser.mjs';
import { given, modelPath, picturePath } from './inputs.mjs';

const PHOTO = picturePath('photo');

/** @type {import('playwright-core').Browser} */
let browser;
/** @type {import('playwright-core').Page} */
let page;
/** @type {{ url: string, close: () => void }} */
let served;
/** @type {string} */
let folder;
/** @type {string[]} what the page should not have said */
const complaints = [];

before(async () => {
  folder = await mkdtemp(join(tmpdir(), 'nst-page-'));
  served = await serve(Object.fromEntries(GRAPHS.map((graph) => [`/portable/models/${graph}.onnx`, modelPath(graph)])));
  const args = [...CHROMIUM_FLAGS, '--disable-gpu'];
  browser = await chromium.launch({ executablePath: given('NST_TEST_CHROMIUM'), args });
  page = await browser.newPage();
  page.on('pageerror', (error) => complaints.push(error.message));
  page.on('console', (message) => message.type() === 'error' && complaints.push(message.text()));
  await page.goto(`${served.url}/portable/web/`);
  await page.waitForSelector('html[data-ready]');
});

after(async () => {
  await browser.close();
  served.close();
  await rm(folder, { recursive: true });
});

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

test('a run can be stopped at any time, and another begun', async () => {
  const [worker] = await Promise.all([page.waitForEvent('worker'), start(400)]);
  assert.match(worker.url(), /worker\.mjs$/);
  await Promise.all([worker.waitForEvent('close'), page.click('#stop')]);
  assert.equal(await page.textContent('#status'), 'Stopped.');
  assert.ok(await page.isEnabled('#start'));
});

test('files that are no model are named at once', async () => {
  await page.setInputFiles('#models', PHOTO);
  await page.waitForSelector('#error:not([hidden])');
  assert.match(String(await page.textContent('#error')), /^photo\.png is not an ONNX file/);
  assert.equal(await page.textContent('#models-name'), 'Choose the files of a model', 'they are not kept');
  await page.setInputFiles('#models', modelPath('grams'));
  await page.waitForFunction(() => document.getElementById('error')?.textContent?.includes('missing'));
  assert.match(String(await page.textContent('#error')), /missing: features, closure/);
  await page.setInputFiles(
    '#models',
    GRAPHS.map((graph) => modelPath(graph)),
  );
  await page.waitForSelector('#error', { state: 'hidden' });
});

test('with files that were chosen the picture changes, the loss falls, and the result can be saved', async () => {
  await start(3);
  await reached(0);
  const [first, before] = [await loss(), await downloaded()];
  await page.waitForFunction(() => document.getElementById('status')?.textContent === 'Done.');
  const [last, finished] = [await loss(), await downloaded()];
  assert.ok(last < 0.9 * first, `the loss went from ${first} to ${last}`);
  assert.deepEqual([finished.info.width, finished.info.height], [128, 64]);
  const changed = finished.data.reduce((total, value, i) => total + Math.abs(value - before.data[i]), 0);
  assert.ok(changed / finished.data.length > 2, 'the picture hardly changed');
  assert.equal(await page.locator('#chart polyline').count(), 1);
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

test('a page without a model beside it says so, and what to do', async () => {
  const nowhere = Object.fromEntries(
    GRAPHS.map((graph) => [`/portable/models/${graph}.onnx`, join(folder, 'nothing')]),
  );
  const { url, close } = await serve(nowhere);
  const other = await browser.newPage();
  await other.goto(`${url}/portable/web/`);
  await other.waitForSelector('html[data-ready]');
  assert.match(String(await other.textContent('#models-hint')), /none beside this page.*nst-model export/);
  await other.setInputFiles('#photo', PHOTO);
  await other.click('#start');
  await other.waitForSelector('#error:not([hidden])');
  assert.match(String(await other.textContent('#error')), /features\.onnx is not there \(404\)/);
  await other.close();
  close();
});

test('nothing else went wrong on the page', () => {
  assert.deepEqual(complaints, []);
});
