//! Progress on a terminal, for anything longer than a second.

use std::io::IsTerminal as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::clock::Stopwatch;
use crate::pipeline::Observer;

/// Shows what is going on, once it has lasted a second.
pub struct Progress {
    visible: bool,
    watch: Stopwatch,
    rows: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    name: &'static str,
    ahead: Option<u64>,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Nothing is shown unless stderr is a terminal.
    pub fn new(quiet: bool) -> Self {
        Progress {
            visible: !quiet && std::io::stderr().is_terminal(),
            watch: Stopwatch::start(),
            rows: AtomicU64::new(0),
            state: Mutex::default(),
        }
    }

    fn show(&self) {
        if !self.visible || self.watch.seconds() < 1.0 {
            return;
        }
        let Ok(mut state) = self.state.lock() else { return };
        let rows = self.rows.load(Ordering::Relaxed);
        if let Some(bar) = &state.bar {
            bar.set_position(rows);
            return;
        }
        let bar = ProgressBar::with_draw_target(state.ahead, ProgressDrawTarget::stderr());
        let template = match state.ahead {
            Some(_) => "{msg:10} {wide_bar} {human_pos}/{human_len} events  {per_sec}  {eta}",
            None => "{msg:10} {spinner} {human_pos} events  {per_sec}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(state.name);
        bar.set_position(rows);
        bar.enable_steady_tick(Duration::from_millis(200));
        state.bar = Some(bar);
    }
}

impl Observer for Progress {
    fn step(&self, name: &'static str, rows: Option<u64>) {
        self.rows.store(0, Ordering::Relaxed);
        if let Ok(mut state) = self.state.lock() {
            if let Some(bar) = state.bar.take() {
                bar.finish_and_clear();
            }
            (state.name, state.ahead) = (name, rows);
        }
        self.show();
    }

    fn rows(&self, rows: u64) {
        self.rows.fetch_add(rows, Ordering::Relaxed);
        self.show();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Ok(mut state) = self.state.lock()
            && let Some(bar) = state.bar.take()
        {
            bar.finish_and_clear();
        }
    }
}
