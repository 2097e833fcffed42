// Styles a photo and shows the making of it:
//
//     node examples/stylize.mjs PHOTO STYLE... [--server localhost:50051] [--size 512] [--iterations 200] [--out out]
//
// Every preview lands in OUT/frames, the finished picture in OUT/result.png. Ctrl-C cancels the job.
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { NstClient, NstError } from '@nst/client';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    server: { type: 'string', default: 'localhost:50051' },
    size: { type: 'string', default: '512' },
    iterations: { type: 'string', default: '200' },
    out: { type: 'string', default: 'out' },
  },
});
const [content, ...styles] = positionals;
if (!content || styles.length === 0) {
  console.error('usage: node examples/stylize.mjs PHOTO STYLE... [--server HOST:PORT] [--size PX] [--iterations N]');
  process.exit(2);
}

const options = { sizePx: Number(values.size), iterations: Number(values.iterations) };
const frames = join(values.out, 'frames');
await mkdir(frames, { recursive: true });

const interrupted = new AbortController();
process.once('SIGINT', () => interrupted.abort());

function show(line, end = '') {
  process.stdout.write(process.stdout.isTTY ? `\r\x1b[K${line}${end}` : `${line}\n`);
}

let finished = '';
const client = new NstClient(values.server);
try {
  for await (const event of client.stylize({ content, styles, options }, { signal: interrupted.signal })) {
    switch (event.kind) {
      case 'snapshot':
      case 'stateChange':
        show(`${event.job.name} ${event.job.state} ${event.job.width}×${event.job.height} ${event.job.device}`);
        break;
      case 'progress': {
        const { iteration, iterations, loss, iterationsPerSecond: speed, remainingS } = event;
        show(
          `${iteration}/${iterations}  loss ${loss.toPrecision(4)}  ${speed.toFixed(1)} it/s  ${remainingS.toFixed()} s`,
        );
        break;
      }
      case 'frame': {
        const name = `${String(event.iteration).padStart(5, '0')}.${event.image.format}`;
        await writeFile(join(frames, name), event.image.data);
        break;
      }
      case 'result': {
        const path = join(values.out, `result.${event.image.format}`);
        await writeFile(path, event.image.data);
        finished = `${path}: ${event.image.width}×${event.image.height}, loss ${event.loss.toPrecision(4)}`;
        break;
      }
    }
  }
  show(finished, '\n');
} catch (error) {
  if (!(error instanceof NstError)) throw error;
  console.error(`\n${error.name}: ${error.message}`);
  process.exitCode = 1;
} finally {
  client.close();
}
