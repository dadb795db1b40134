import { ServerConnection } from '@jupyterlab/services';
import { Poll } from '@lumino/polling';
import { ISignal, Signal } from '@lumino/signaling';

import { request } from './request';

/** What the server extension tells about the embedded engine. */
export interface IEngineStatus {
  /** `root`, `rootless` or `proot`; null where this machine allows none of them. */
  driver: string | null;
  running: number;
  total: number;
  version: string;
  /** Why there is no driver, for the tooltip. */
  problem: string | null;
}

/** Polls the engine's status while the page is visible, backing off when the server does not answer. */
export class StatusModel {
  constructor(settings: ServerConnection.ISettings, interval: number) {
    this._poll = new Poll<void, unknown>({
      name: 'labkernel:status',
      auto: true,
      frequency: { interval, backoff: true, max: 60_000 },
      standby: 'when-hidden',
      factory: async () => {
        try {
          this._set(await request<IEngineStatus>('status', settings));
        } catch (error) {
          this._set(null);
          throw error;
        }
      }
    });
  }

  /** Null until the first answer, and while the server does not answer. */
  get status(): IEngineStatus | null {
    return this._status;
  }

  get changed(): ISignal<this, void> {
    return this._changed;
  }

  set interval(milliseconds: number) {
    this._poll.frequency = { ...this._poll.frequency, interval: milliseconds };
  }

  refresh(): Promise<void> {
    return this._poll.refresh();
  }

  dispose(): void {
    this._poll.dispose();
    Signal.clearData(this);
  }

  private _set(status: IEngineStatus | null): void {
    if (JSON.stringify(status) !== JSON.stringify(this._status)) {
      this._status = status;
      this._changed.emit();
    }
  }

  private _poll: Poll<void, unknown>;
  private _status: IEngineStatus | null = null;
  private _changed = new Signal<this, void>(this);
}
