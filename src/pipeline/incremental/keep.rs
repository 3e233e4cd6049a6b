//! Keeping matches of events with meters for later runs, see [`kept`](super::kept).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rustc_hash::FxHashSet;
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::xxh3_64;

use super::LARGE_ROWS;
use super::kept::Kept;
use super::segment::{Index, Listed, MANIFEST, Manifest, Replaced, ShardIndex, Tables, VERSION, index_path, matches_path, nanos};
use crate::config;
use crate::pipeline::aggregate::Shard;
use crate::pipeline::context::Context;
use crate::pipeline::range::Completeness;
use crate::pipeline::spill::{KeptFile, partial};
use crate::pipeline::state::Interner;
use crate::pipeline::{Inputs, Request};
use crate::source::Field;

/// Events that a run may read again before it is cheaper to begin anew.
const MOST_REPLACED: usize = 2_000_000;

/// Whether what a request computes may be kept for later ones.
fn may_keep(inputs: &Inputs<'_>, request: &Request, rows: u64) -> bool {
    let Inputs { job, reference, .. } = *inputs;
    let key = &job.deduplicate.key;
    let is_worth_it = match (job.incremental, request.completeness) {
        (config::Incremental::Never, _) => false,
        (config::Incremental::Always, _) | (_, Completeness::Incremental) => true,
        (config::Incremental::Auto, _) => rows >= LARGE_ROWS,
    };
    is_worth_it
        // Two events of another key could have the same identity.
        && key.len() == 2 && key.contains(&Field::TenantId) && key.contains(&Field::Id)
        // What a run leaves out depends on when it runs.
        && job.lateness == config::Lateness::default()
        && !reference.has_levels(None)
        && request.is_of_everything()
}

/// Where a run of a job of so many rows keeps its matches; `None` where it does not, or
/// cannot write there.
pub fn folder(inputs: &Inputs<'_>, request: &Request, rows: u64) -> Option<PathBuf> {
    let folder = inputs.keys.folder.as_deref().filter(|_| inputs.keys.writes && may_keep(inputs, request, rows))?;
    match fs::create_dir_all(folder).and_then(|()| partial(folder)) {
        Ok(_) => Some(folder.to_owned()),
        Err(error) => {
            tracing::debug!("{}: no matches are kept: {error}", folder.display());
            None
        }
    }
}

/// What is to become of kept matches when a run is published.
#[derive(Debug, Default)]
pub enum Keep {
    /// The run says nothing about them.
    #[default]
    AsTheyAre,
    /// They are of no use any more.
    Nothing(PathBuf),
    Segment(Draft),
}

impl Keep {
    /// After a run of the whole job that kept nothing.
    pub fn nothing(inputs: &Inputs<'_>, request: &Request) -> Keep {
        let folder = inputs.keys.folder.clone().filter(|_| inputs.keys.writes && request.is_of_everything());
        folder.map_or(Keep::AsTheyAre, Keep::Nothing)
    }

    /// What is to be kept of a run, once everything is aggregated.
    pub fn of(
        folder: &Path,
        context: &Context<'_>,
        (shards, dimensions): (Vec<Shard>, &Interner),
        before: Option<&Kept>,
        replaced: &FxHashSet<u128>,
    ) -> Keep {
        let nothing = || Keep::Nothing(folder.to_owned());
        if replaced.len() > MOST_REPLACED {
            return nothing();
        }
        let tables = Tables::of(context.enricher.reference, &context.parts);
        let is_known = before.and_then(Kept::tables) == Some(&tables);
        let replaced = Replaced::of(replaced, context.marks.as_ref());
        let mut index = Index { tables: (!is_known).then_some(tables), shards: Vec::new(), replaced };
        let mut files = Vec::new();
        for shard in shards {
            match shard.matches.into_kept() {
                Ok(None) => {}
                Ok(Some((KeptFile { file, pieces, length }, spans))) => {
                    let dimensions = shard.dimensions.iter().map(|number| dimensions.text(*number).to_string()).collect();
                    index.shards.push(ShardIndex { spans: spans.iter().map(nanos).collect(), dimensions, pieces, length });
                    files.push(file);
                }
                Err(error) => {
                    tracing::warn!("{}: no matches are kept: {error}", folder.display());
                    return nothing();
                }
            }
        }
        let before = before.map(Kept::listed);
        Keep::Segment(Draft { folder: folder.to_owned(), files, index, before: before.unwrap_or_default() })
    }

    /// Lets later runs find what is kept. What cannot be written is done without.
    pub fn publish(self, run_id: &str) {
        let (folder, kept) = match self {
            Keep::AsTheyAre => return,
            Keep::Nothing(folder) => (folder, None),
            Keep::Segment(draft) => {
                let folder = draft.folder.clone();
                match draft.write(run_id) {
                    Ok(segments) => (folder, Some(segments)),
                    Err(error) => {
                        tracing::warn!("{}: no matches are kept: {error:#}", folder.display());
                        (folder, None)
                    }
                }
            }
        };
        if kept.is_none() {
            let _ = fs::remove_file(folder.join(MANIFEST));
        }
        remove_segments_but(&folder, kept.as_deref().unwrap_or_default());
    }
}

/// A segment that is written but not published.
#[derive(Debug)]
pub struct Draft {
    folder: PathBuf,
    /// By shard.
    files: Vec<NamedTempFile>,
    index: Index,
    before: Vec<Listed>,
}

impl Draft {
    /// Returns the names of all segments.
    fn write(self, run_id: &str) -> Result<Vec<String>> {
        let mut segments = self.before;
        // Tables that are not what they were tell which rows there were no more for a while.
        if !self.files.is_empty() || !self.index.replaced.events.is_empty() || self.index.tables.is_some() {
            for (shard, file) in self.files.into_iter().enumerate() {
                file.persist(matches_path(&self.folder, run_id, shard))?;
            }
            let bytes = zstd::encode_all(serde_json::to_vec(&self.index)?.as_slice(), 1)?;
            fs::write(index_path(&self.folder, run_id), &bytes)?;
            segments.push(Listed { name: run_id.to_owned(), checksum: xxh3_64(&bytes) });
        }
        let manifest = Manifest { version: VERSION, run_id: run_id.to_owned(), segments };
        let partial = self.folder.join("matches.json.partial");
        fs::write(&partial, serde_json::to_vec(&manifest)?)?;
        fs::rename(&partial, self.folder.join(MANIFEST))?;
        Ok(manifest.segments.into_iter().map(|segment| segment.name).collect())
    }
}

fn remove_segments_but(folder: &Path, kept: &[String]) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_ours = path.extension().is_some_and(|extension| extension == "matches" || extension == "index");
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_kept = name.split('.').next().is_some_and(|of| kept.iter().any(|segment| segment == of));
        if is_ours && !is_kept {
            let _ = fs::remove_file(path);
        }
    }
}
