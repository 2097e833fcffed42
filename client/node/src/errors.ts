// What this client throws. No error of grpc-js leaves it.
//
//   NstError
//   ├── InvalidArgumentError      a field is missing, malformed or out of range; `field` names it
//   ├── NotFoundError             no job, image, style or model of that name
//   ├── AlreadyExistsError        the id stands for another style, the requestId for another request
//   ├── FailedPreconditionError   the model's weights are not on the server, or the job has ended
//   ├── ResourceExhaustedError    a request larger than the server takes, a full data folder
//   │   └── QueueFullError        come back after `retryAfterMs`
//   ├── UnavailableError          no server there, or it was away for too long
//   ├── DeadlineExceededError     `deadlineMs` has passed
//   ├── CancelledError            the AbortSignal fired (its reason is `cause`), or the stream was left
//   ├── JobFailedError            the job ended without a result; `reason` and `code` say why
//   ├── JobCancelledError         somebody else cancelled the job
//   ├── BrokenStreamError         what arrived is incomplete or contradicts the contract
//   └── ServerError               anything else
import { status, type ServiceError } from '@grpc/grpc-js';
import type { Job } from './messages.js';
import { statusDetails, type FieldViolation } from './status_details.js';

export interface ErrorDetails {
  /** The google.rpc.Code, equal to the gRPC status code. */
  code?: number;
  /** For programs: the ErrorInfo's reason. */
  reason?: string | undefined;
  /** The ErrorInfo's metadata. */
  metadata?: Record<string, string>;
  /** Fields at fault. */
  violations?: FieldViolation[];
  /** When to try again, milliseconds from now. */
  retryAfterMs?: number | undefined;
  cause?: unknown;
}

/** Everything that this client throws. */
export class NstError extends Error {
  /** The google.rpc.Code, equal to the gRPC status code: 3 is INVALID_ARGUMENT. */
  readonly code: number;
  /** For programs: why, as the server calls it. */
  readonly reason: string | undefined;
  /** Further facts that the server gave. */
  readonly metadata: Readonly<Record<string, string>>;

  constructor(message: string, { code = status.UNKNOWN, reason, metadata = {}, cause }: ErrorDetails = {}) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = new.target.name;
    this.code = code;
    this.reason = reason;
    this.metadata = metadata;
  }
}

/** A field is missing, malformed or out of range. Nothing was started. */
export class InvalidArgumentError extends NstError {
  /** The first field at fault, as the contract writes it: `options.iterations`. */
  readonly field: string | undefined;
  /** Every field at fault. */
  readonly violations: readonly FieldViolation[];

  constructor(message: string, details: ErrorDetails = {}) {
    super(message, { code: status.INVALID_ARGUMENT, ...details });
    this.violations = details.violations ?? [];
    this.field = this.violations[0]?.field;
  }
}

/** There is no job, image, style or model of that name. */
export class NotFoundError extends NstError {}

/** The id stands for a style with other images, weights or display name; or the requestId for another request. */
export class AlreadyExistsError extends NstError {}

/** The model's weights are not on the server, or the job has ended and changes no more. */
export class FailedPreconditionError extends NstError {}

/** A limit was reached: the request is larger than the server takes, or its data folder is full. */
export class ResourceExhaustedError extends NstError {}

/** The server's queue is full. */
export class QueueFullError extends ResourceExhaustedError {
  /** When to try again, milliseconds from now. */
  readonly retryAfterMs: number;

  constructor(message: string, details: ErrorDetails & { retryAfterMs: number }) {
    super(message, details);
    this.retryAfterMs = details.retryAfterMs;
  }
}

/** There is no server at that address, it is starting or stopping, or the connection was lost. */
export class UnavailableError extends NstError {
  /** When to try again, milliseconds from now; undefined if the server did not say. */
  readonly retryAfterMs: number | undefined;

  constructor(message: string, details: ErrorDetails = {}) {
    super(message, { code: status.UNAVAILABLE, ...details });
    this.retryAfterMs = details.retryAfterMs;
  }
}

/** The call's deadline has passed. */
export class DeadlineExceededError extends NstError {}

/** The call was cancelled by its caller: `cause` is the AbortSignal's reason, if it was by that. */
export class CancelledError extends NstError {
  constructor(message: string, details: ErrorDetails = {}) {
    super(message, { code: status.CANCELLED, ...details });
  }
}

/** The job ended without a result. `reason`, `code` and the message are those of `job.error`. */
export class JobFailedError extends NstError {
  constructor(
    /** The job as it ended. */
    readonly job: Job,
  ) {
    const { message = '', code = status.UNKNOWN, reason } = job.error ?? {};
    super(message || `${job.name} failed`, { code, reason });
  }
}

/** The job was cancelled before it had a result, and not by this stream. */
export class JobCancelledError extends NstError {
  constructor(
    /** The job as it ended. */
    readonly job: Job,
  ) {
    super(`${job.name} was cancelled`, { code: status.CANCELLED });
  }
}

/** The stream ended before the job did, or a picture's parts do not make a whole. */
export class BrokenStreamError extends NstError {
  constructor(message: string, details: ErrorDetails = {}) {
    super(message, { code: status.DATA_LOSS, ...details });
  }
}

/** The server could not answer, for a reason that has no class of its own; `code` tells which. */
export class ServerError extends NstError {}

const CLASS_OF_STATUS: Partial<Record<number, new (message: string, details: ErrorDetails) => NstError>> = {
  [status.INVALID_ARGUMENT]: InvalidArgumentError,
  [status.DEADLINE_EXCEEDED]: DeadlineExceededError,
  [status.NOT_FOUND]: NotFoundError,
  [status.ALREADY_EXISTS]: AlreadyExistsError,
  [status.RESOURCE_EXHAUSTED]: ResourceExhaustedError,
  [status.FAILED_PRECONDITION]: FailedPreconditionError,
};

/** The error to throw for whatever a call to `address` ended with. */
export function asNstError(error: unknown, address: string): unknown {
  if (error instanceof NstError) return error;
  if (isServiceError(error)) return fromServiceError(error, address);
  if (isPrematureClose(error)) return new BrokenStreamError('the stream was closed early', { cause: error });
  return error;
}

function fromServiceError(error: ServiceError, address: string): NstError {
  const { code, details: message } = error;
  const details: ErrorDetails = { code, ...statusDetails(error.metadata), cause: error };
  if (code === status.RESOURCE_EXHAUSTED && details.retryAfterMs !== undefined) {
    return new QueueFullError(message, { ...details, retryAfterMs: details.retryAfterMs });
  }
  // CANCELLED that nobody here asked for is how a server that stops ends its calls; a stream that something on the way
  // has cut has no status, only what grpc-js makes of that.
  const cut = code === status.INTERNAL && message.startsWith('Received RST_STREAM');
  if (code === status.UNAVAILABLE || code === status.CANCELLED || cut) {
    return new UnavailableError(`the server at ${address} is not available: ${message}`, {
      ...details,
      code: status.UNAVAILABLE,
    });
  }
  return new (CLASS_OF_STATUS[code] ?? ServerError)(message, details);
}

function isServiceError(error: unknown): error is ServiceError {
  return error instanceof Error && 'metadata' in error && typeof (error as ServiceError).code === 'number';
}

function isPrematureClose(error: unknown): boolean {
  return error instanceof Error && (error as NodeJS.ErrnoException).code === 'ERR_STREAM_PREMATURE_CLOSE';
}
