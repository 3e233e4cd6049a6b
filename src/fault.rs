//! What went wrong, as far as the caller of the program can branch on it.

/// The kinds of failure that have an exit code of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The command line, the job file or a reference table is wrong.
    Configuration,
    /// A promise would be broken; nothing was published.
    Invariant,
    /// Part of a publication is written; the rest can be resumed.
    Partial,
    /// Another run of the same job holds the lock.
    LockHeld,
    /// A saved plan no longer holds.
    Stale,
    /// The change is larger than the job's guard allows, or needs to be approved.
    Guard,
    /// Somebody asked the process to end: SIGINT.
    Interrupted,
    /// SIGTERM.
    Terminated,
}

impl FaultKind {
    /// Whether the process was asked to end.
    pub fn is_interruption(self) -> bool {
        matches!(self, FaultKind::Interrupted | FaultKind::Terminated)
    }

    /// The exit code of the command line contract.
    pub fn exit_code(self) -> u8 {
        match self {
            FaultKind::Configuration => 2,
            FaultKind::Invariant => 4,
            FaultKind::Partial => 5,
            FaultKind::LockHeld => 6,
            FaultKind::Stale => 7,
            FaultKind::Guard => 8,
            FaultKind::Interrupted => 130,
            FaultKind::Terminated => 143,
        }
    }
}

/// An error of a known kind. It travels inside `anyhow::Error`.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    pub kind: FaultKind,
    message: String,
}

/// An error in the command line, the job file or a reference table.
pub fn configuration(message: impl Into<String>) -> anyhow::Error {
    fault(FaultKind::Configuration, message)
}

/// An error of the given kind.
pub fn fault(kind: FaultKind, message: impl Into<String>) -> anyhow::Error {
    Fault { kind, message: message.into() }.into()
}

/// The kind of an error: of the first [`Fault`] in its chain.
pub fn kind(error: &anyhow::Error) -> Option<FaultKind> {
    error.chain().find_map(|cause| cause.downcast_ref::<Fault>()).map(|fault| fault.kind)
}

/// The exit code of an error: of its kind, otherwise 1.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    kind(error).map_or(1, FaultKind::exit_code)
}
