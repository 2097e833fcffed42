const BUNDLES = {
  wasm: './node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs',
  webgpu: './node_modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs',
};

/**
 * Returns onnxruntime-web for a device: `wasm` is the CPU.
 *
 * @param {'wasm' | 'webgpu'} device
 * @returns {Promise<typeof import('onnxruntime-web')>}
 */
export async function runtimeOf(device) {
  const ort = await import(BUNDLES[device]);
  // Half of the logical processors are cores, as a rule, and convolutions gain nothing by the other half.
  ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(8, Math.ceil(navigator.hardwareConcurrency / 2)) : 1;
  return ort;
}
