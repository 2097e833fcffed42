// A client of a scripted server, closed after each test, and what to ask of its streams.
import assert from 'node:assert/strict';
import { afterEach } from 'node:test';
import { NstClient, type ClientOptions, type StylizeEvent } from '@nst/client';
import { ScriptedServer, type Script } from './scripted_server.js';

export const PHOTO = { content: Buffer.from('a photo'), styles: [Buffer.from('a style')] };
export const FINISHED = { stateChange: { job: { name: 'jobs/1', state: 'JOB_STATE_SUCCEEDED' } } } as const;

/** What is to be closed after the test, the last first. */
export const open: (() => void)[] = [];
afterEach(() => {
  for (const close of open.splice(0).reverse()) close();
});

export async function connect(script: Script, options?: ClientOptions): Promise<NstClient> {
  const server = await ScriptedServer.start(script);
  const client = new NstClient(server.address, options);
  open.push(() => server.stop());
  open.push(() => client.close());
  return client;
}

export async function collect(events: AsyncIterable<StylizeEvent>): Promise<StylizeEvent[]> {
  const collected: StylizeEvent[] = [];
  for await (const event of events) collected.push(event);
  return collected;
}

export async function rejection(promise: Promise<unknown>): Promise<Error> {
  return promise.then(
    () => assert.fail('it did not throw'),
    (error: Error) => error,
  );
}

export function events<Kind extends StylizeEvent['kind']>(all: StylizeEvent[], kind: Kind) {
  return all.filter((event): event is Extract<StylizeEvent, { kind: Kind }> => event.kind === kind);
}
