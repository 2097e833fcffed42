// The events of a job's stream, whole: a picture that came in parts is one event here.
import { contract } from './contract.js';
import { BrokenStreamError } from './errors.js';
import type { ImagePart } from './generated/nst/v1/ImagePart.js';
import type { JobEvent } from './generated/nst/v1/JobEvent.js';
import { ImageAssembler, type EncodedImage } from './image_parts.js';
import type { Job, Progress, StopReason } from './messages.js';
import { toPlain } from './plain.js';

/** What every event carries. */
export interface EventHeader {
  /** State changes, progress and the result are numbered 1, 2, 3 …; a snapshot or frame has the last one's number. */
  readonly sequence: number;
  /** Which attempt at the job this is, from 1. */
  readonly attempt: number;
  /** When it happened, by the server's clock. */
  readonly time: Date;
}

/** The job when the stream began. The first event; a stream that was taken up again has no second one. */
export interface SnapshotEvent extends EventHeader {
  readonly kind: 'snapshot';
  readonly job: Job;
}

/** The job entered another state. The last event of every stream is the one to a terminal state. */
export interface StateChangeEvent extends EventHeader {
  readonly kind: 'stateChange';
  readonly job: Job;
}

/** An iteration was made: iteration 0 is the starting picture. */
export type ProgressEvent = EventHeader & Readonly<Progress> & { readonly kind: 'progress' };

/** A picture on the way. */
export interface FrameEvent extends EventHeader {
  readonly kind: 'frame';
  /** The iteration whose picture this is. */
  readonly iteration: number;
  /** Frames left out since the previous one because this client or the network was slower than the optimizer. */
  readonly skipped: number;
  readonly image: EncodedImage;
}

/** The finished picture. */
export interface ResultEvent extends EventHeader {
  readonly kind: 'result';
  /** The iteration whose picture this is. */
  readonly iteration: number;
  /** The objective at that picture. */
  readonly loss: number;
  /** Why the optimization ended there. */
  readonly stopReason: StopReason;
  readonly image: EncodedImage;
}

/** One event of a job's stream; `kind` tells which. */
export type StylizeEvent = SnapshotEvent | StateChangeEvent | ProgressEvent | FrameEvent | ResultEvent;

/** Makes events of messages. One for each stream. */
export class EventReader {
  readonly #frame = new ImageAssembler('frame');
  readonly #result = new ImageAssembler('result');

  /** The event that `message` completes; undefined if it is a part of one, or of a kind that this client ignores. */
  read(message: JobEvent): StylizeEvent | undefined {
    const header = toPlain(contract.JobEvent, { ...message, snapshot: null, frame: null, result: null });
    const { sequence, attempt, eventTime: time = new Date() } = header;
    const about = { sequence, attempt, time };
    if (message.snapshot) return { kind: 'snapshot', ...about, job: toPlain(contract.Job, message.snapshot) };
    if (message.stateChange) {
      if (!message.stateChange.job) throw new BrokenStreamError('a state change came without its job');
      return { kind: 'stateChange', ...about, job: toPlain(contract.Job, message.stateChange.job) };
    }
    if (message.progress) return { kind: 'progress', ...about, ...toPlain(contract.Progress, message.progress) };
    if (message.frame) {
      const image = this.#frame.add(required(message.frame.image));
      const { iteration, skipped } = message.frame;
      return image && { kind: 'frame', ...about, iteration, skipped, image };
    }
    if (message.result) {
      const image = this.#result.add(required(message.result.image));
      const { iteration, loss, stopReason } = toPlain(contract.Result, { ...message.result, image: null });
      return image && { kind: 'result', ...about, iteration, loss, stopReason, image };
    }
    return undefined;
  }

  /** Raises BrokenStreamError if a picture is incomplete. */
  end(): void {
    this.#frame.end();
    this.#result.end();
  }
}

function required(part: ImagePart | null): ImagePart {
  if (!part) throw new BrokenStreamError('a picture came without its data');
  return part;
}
