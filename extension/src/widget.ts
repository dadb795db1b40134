import { TranslationBundle } from '@jupyterlab/translation';
import { Widget } from '@lumino/widgets';

import { StatusModel } from './model';

/** The status bar item: `lab: root · 2 running`. */
export class StatusItem extends Widget {
  constructor(model: StatusModel, trans: TranslationBundle) {
    super({ node: document.createElement('span') });
    this._model = model;
    this._trans = trans;
    this.addClass('jp-labkernel-status');
    this.node.setAttribute('role', 'status');
    model.changed.connect(this._render, this);
    this._render();
  }

  dispose(): void {
    if (!this.isDisposed) {
      this._model.changed.disconnect(this._render, this);
    }
    super.dispose();
  }

  private _render(): void {
    const status = this._model.status;
    const trans = this._trans;
    let text: string;
    let title: string;
    if (status === null) {
      text = trans.__('lab: no answer');
      title = trans.__('The Jupyter server does not answer for labkernel. Is its server extension enabled?');
    } else if (status.driver === null) {
      text = trans.__('lab: no driver');
      title = status.problem ?? trans.__('This machine allows no driver; run %lab doctor in a notebook.');
    } else {
      text = trans.__('lab: %1 · %2 running', status.driver, status.running);
      title = trans.__(
        'labkernel %1, driver %2: %3 of %4 containers running',
        status.version,
        status.driver,
        status.running,
        status.total
      );
    }
    this.node.textContent = text;
    this.node.title = title;
    this.toggleClass('jp-mod-running', (status?.running ?? 0) > 0);
  }

  private _model: StatusModel;
  private _trans: TranslationBundle;
}
