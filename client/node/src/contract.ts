// The contract, loaded from the .proto files that lie beside this package's code.
import { fileURLToPath } from 'node:url';
import { loadPackageDefinition } from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';
import type { ProtoGrpcType as ImageContract } from './generated/image_service.js';
import type { ProtoGrpcType as ModelContract } from './generated/model_service.js';
import type { ProtoGrpcType as StyleContract } from './generated/style_service.js';
import type { ProtoGrpcType as TransferContract } from './generated/style_transfer_service.js';

type Contract = (ImageContract & ModelContract & StyleContract & TransferContract)['nst']['v1'];

/** Every definition by its full name, `nst.v1.Job` for instance. */
export const definitions = loadSync(
  ['style_transfer_service', 'style_service', 'model_service', 'image_service'].map((name) => `nst/v1/${name}.proto`),
  {
    includeDirs: [fileURLToPath(new URL('proto', import.meta.url))],
    // The types in ./generated are made with the same choices: see scripts/contract.mjs.
    longs: Number,
    enums: String,
    defaults: true,
    arrays: true,
    objects: true,
  },
);

/** The services and messages of `nst.v1`, typed. */
export const contract = (loadPackageDefinition(definitions) as unknown as { nst: { v1: Contract } }).nst.v1;
