import assert from 'node:assert/strict';
import { test } from 'node:test';
import { chromium } from 'playwright-core';
import { CHROMIUM_FLAGS, serve } from './browser.mjs';
import { given, modelPath } from './inputs.mjs';

// A GPU that the CPU computes, with the arithmetic of a real one.
const SOFTWARE_GPU = ['--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader', '--enable-features=Vulkan'];

test('WebGPU computes what WebAssembly does', async () => {
  const { url, close } = await serve({ '/closure.onnx': modelPath('closure') });
  const args = [...CHROMIUM_FLAGS, ...SOFTWARE_GPU];
  const browser = await chromium.launch({ executablePath: given('NST_TEST_CHROMIUM'), args });
  try {
    const page = await browser.newPage();
    await page.goto(`${url}/portable/web/`);
    await page.waitForSelector('html[data-ready]');
    const options = await page.locator('#device option').allTextContents();
    assert.deepEqual(options, ['GPU', 'CPU']);
    const { cpu, gpu } = await page.evaluate(compared, `${url}/closure.onnx`);
    assert.ok(Math.abs(gpu.total / cpu.total - 1) < 1e-5, `${gpu.total} is not ${cpu.total}`);
    const distance = norm(gpu.gradient.map((value, i) => value - cpu.gradient[i])) / norm(cpu.gradient);
    assert.ok(distance < 1e-5, `the gradient is ${distance} off`);
  } finally {
    await browser.close();
    close();
  }
});

/**
 * Runs in the page: returns what the closure makes of one random picture, by device.
 *
 * @param {string} url of the closure
 */
async function compared(url) {
  const [{ Graphs }, { readDescription }, { WEIGHTS }, { runtimeOf }] = await Promise.all(
    ['graphs.mjs', 'description.mjs', 'stylize.mjs', 'runtime.mjs'].map(
      (path) => import(new URL(path, location.href).href),
    ),
  );
  const bytes = new Uint8Array(await (await fetch(url)).arrayBuffer());
  const description = await readDescription(bytes, 'closure.onnx');
  let seed = 1;
  const random = (/** @type {number} */ length) =>
    Float32Array.from({ length }, () => (seed = (seed * 16807) % 2147483647) / 2147483647);
  const picture = { width: 18, height: 16, data: random(3 * 18 * 16) };
  const content = random(512 * 2 * 2);
  const grams = [64, 128, 256, 512, 512].map((channels) => [channels, random(channels * channels)]);
  const evaluated = async (/** @type {'wasm' | 'webgpu'} */ device) => {
    const ort = await runtimeOf(device);
    const graphs = new Graphs(ort, new Map([['closure', { name: 'closure.onnx', bytes, description }]]), {
      executionProviders: [device],
    });
    /** @type {Record<string, unknown>} */
    const targets = { 'content.relu4_2': new ort.Tensor('float32', content, [1, 512, 2, 2]) };
    grams.forEach(([channels, gram], i) => {
      targets[`style.relu${i + 1}_1`] = new ort.Tensor('float32', gram, [channels, channels]);
    });
    const { total, gradient } = await graphs.evaluate(picture, targets, WEIGHTS);
    return { total: /** @type {number} */ (total), gradient: /** @type {number[]} */ ([...gradient]) };
  };
  return { cpu: await evaluated('wasm'), gpu: await evaluated('webgpu') };
}

/** @param {number[]} vector */
function norm(vector) {
  return Math.sqrt(vector.reduce((total, value) => total + value ** 2, 0));
}
