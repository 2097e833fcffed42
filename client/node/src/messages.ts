// The contract's messages as this client takes and returns them. Their fields and comments come from the .proto files.
import type { Encoding as WireEncoding } from './generated/nst/v1/Encoding.js';
import type { ExportModelRequest as WireExportModelRequest } from './generated/nst/v1/ExportModelRequest.js';
import type { ExportStyleRequest as WireExportStyleRequest } from './generated/nst/v1/ExportStyleRequest.js';
import type { ImageFormat as WireImageFormat } from './generated/nst/v1/ImageFormat.js';
import type { Job as WireJob } from './generated/nst/v1/Job.js';
import type { JobResult as WireJobResult } from './generated/nst/v1/JobResult.js';
import type { JobState as WireJobState } from './generated/nst/v1/JobState.js';
import type { Model as WireModel } from './generated/nst/v1/Model.js';
import type { OptionDescription as WireOptionDescription } from './generated/nst/v1/OptionDescription.js';
import type { Preview as WirePreview } from './generated/nst/v1/Preview.js';
import type { Progress as WireProgress } from './generated/nst/v1/Progress.js';
import type { StopReason as WireStopReason } from './generated/nst/v1/StopReason.js';
import type { StoredImage as WireStoredImage } from './generated/nst/v1/StoredImage.js';
import type { Style as WireStyle } from './generated/nst/v1/Style.js';
import type { StylizeOptions as WireStylizeOptions } from './generated/nst/v1/StylizeOptions.js';
import type { Choice, Input, Plain } from './plain.js';

export type ImageFormat = Choice<WireImageFormat>;
export type JobState = Choice<WireJobState>;
export type StopReason = Choice<WireStopReason>;

export interface Encoding extends Input<WireEncoding> {}
/** What to export of which feature model; what is left out is the server's choice. */
export interface ModelExport extends Omit<Input<WireExportModelRequest>, 'offset' | 'sha256'> {}
/** For which pictures a style file is to be; what is left out is the server's choice. */
export interface StyleExport extends Omit<Input<WireExportStyleRequest>, 'name' | 'offset' | 'sha256'> {}
export interface Preview extends Input<WirePreview> {}
export interface StylizeOptions extends Input<WireStylizeOptions> {}

export type Job = Plain<WireJob>;
export type JobResult = Plain<WireJobResult>;
export type Model = Plain<WireModel>;
export type Progress = Plain<WireProgress>;
export type StoredImage = Plain<WireStoredImage>;
export type Style = Plain<WireStyle>;

/** One option, described for programs, and its name here. */
export type OptionDescription = Plain<WireOptionDescription> & {
  /** Its name in StylizeOptions: `sizePx` where `name` is `size_px`. */
  key: keyof StylizeOptions;
};

/** A starting point that other options override: `stylize({ …, options: { preset: 'gatys' } })`. */
export interface Preset {
  /** The value of the option `preset`. */
  readonly name: string;
  /** What it is for, in English. */
  readonly description: string;
  /** The options it stands for, every one filled in. */
  readonly options: StylizeOptions;
}
