// Client of the neural style transfer service.
export { credentials } from '@grpc/grpc-js';
export { NstClient } from './client.js';
export type {
  CreateStyleRequest,
  ExportOptions,
  ImportOptions,
  JobUpdate,
  ListJobsOptions,
  ListOptions,
  WatchOptions,
} from './client.js';
export type { CallOptions, ClientOptions } from './connection.js';
export {
  AlreadyExistsError,
  BrokenStreamError,
  CancelledError,
  DeadlineExceededError,
  FailedPreconditionError,
  InvalidArgumentError,
  JobCancelledError,
  JobFailedError,
  NotFoundError,
  NstError,
  QueueFullError,
  ResourceExhaustedError,
  ServerError,
  UnavailableError,
} from './errors.js';
export type {
  EventHeader,
  FrameEvent,
  ProgressEvent,
  ResultEvent,
  SnapshotEvent,
  StateChangeEvent,
  StylizeEvent,
} from './events.js';
export type { EncodedImage } from './image_parts.js';
export type { ImageFile, ImageSource, StyleImageSource, StyleSettings, StyleSource } from './images.js';
export type {
  Encoding,
  ImageFormat,
  Job,
  JobResult,
  JobState,
  Model,
  ModelExport,
  OptionDescription,
  Preset,
  Preview,
  Progress,
  StopReason,
  StoredImage,
  Style,
  StyleExport,
  StylizeOptions,
} from './messages.js';
export { readParameters } from './parameters.js';
export type { PictureParameters, StyleRecord } from './parameters.js';
export type { JsonValue } from './plain.js';
export type { StylizeRequest } from './requests.js';
export type { FieldViolation } from './status_details.js';
export type { Stylization } from './stylization.js';
export type { ExportedFile, OnProgress } from './transfers.js';
