// Brings the contract into the package: the .proto files from the repository, and TypeScript types made from them.
// Neither is committed; ../../proto is the only source.
import { execFileSync } from 'node:child_process';
import { cpSync, existsSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';

const path = (relative) => fileURLToPath(new URL(relative, import.meta.url));
const source = path('../../../proto/nst/v1');
const protos = path('../dist/proto');
const types = path('../src/generated');

if (!existsSync(source)) {
  console.error(`The contract is not at ${source}. Build this package in a checkout of the whole repository.`);
  process.exit(1);
}

rmSync(protos, { recursive: true, force: true });
rmSync(types, { recursive: true, force: true });
cpSync(source, `${protos}/nst/v1`, {
  recursive: true,
  filter: (file) => file === source || file.endsWith('.proto'),
});

// The choices here and those of `loadSync` in src/contract.ts must be the same.
execFileSync(
  process.execPath,
  [
    createRequire(import.meta.url).resolve('@grpc/proto-loader/build/bin/proto-loader-gen-types.js'),
    '--longs=Number',
    '--enums=String',
    '--defaults',
    '--arrays',
    '--objects',
    '--includeComments',
    '--inputTemplate=%s__Input',
    '--outputTemplate=%s',
    '--grpcLib=@grpc/grpc-js',
    '--importFileExtension=.js',
    `--includeDirs=${protos}`,
    `--outDir=${types}`,
    'nst/v1/style_transfer_service.proto',
    'nst/v1/style_service.proto',
    'nst/v1/model_service.proto',
    'nst/v1/image_service.proto',
  ],
  { stdio: 'inherit' },
);
