import { GRAPHS } from './graphs.mjs';

/** Where the model's files are, unless somebody chooses others. */
export const MODELS = GRAPHS.map((graph) => new URL(`../models/${graph}.onnx`, import.meta.url));
