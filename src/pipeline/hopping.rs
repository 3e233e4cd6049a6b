//! Hopping windows from the panes that events were counted in.

use std::collections::BTreeMap;

use super::state::{StateKey, WindowState};
use crate::model::timestamp::Timestamp;
use crate::model::window::{Hopping, Span};

/// The windows of one accumulation by their start; each is its panes together.
pub fn windows(panes: &[(StateKey, WindowState)], hopping: Hopping, timezone: chrono_tz::Tz) -> BTreeMap<Timestamp, WindowState> {
    let mut windows: BTreeMap<Timestamp, WindowState> = BTreeMap::new();
    for (key, pane) in panes {
        let span = Span { start: key.window_start, end: pane.window_end };
        for window in hopping.windows(span, timezone) {
            match windows.get_mut(&window.start) {
                Some(state) => state.merge(pane, None),
                None => {
                    windows.insert(window.start, pane.clone());
                }
            }
            if let Some(state) = windows.get_mut(&window.start) {
                state.window_end = window.end;
            }
        }
    }
    windows
}
