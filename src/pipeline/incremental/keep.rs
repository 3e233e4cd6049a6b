//! Keeping matches of events with meters for later runs, see [`kept`](super::kept).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rustc_hash::FxHashSet;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::xxh3_64;

use super::LARGE_ROWS;
use super::kept::Kept;
use super::segment::{
    Index, Listed, MANIFEST, Manifest, Replaced, ShardIndex, Tables, VERSION, index_path, matches_path, nanos, values_path,
};
use super::values::{KeptLists, ListKeeper};
use crate::config;
use crate::model::timestamp::Timestamp;
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
    Segment(Box<Draft>),
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
        (lists, rounded): (ListKeeper, BTreeSet<u32>),
    ) -> Keep {
        let nothing = || Keep::Nothing(folder.to_owned());
        if replaced.len() > MOST_REPLACED {
            return nothing();
        }
        let tables = Tables::of(context.enricher.reference, &context.parts);
        let is_known = before.and_then(Kept::tables) == Some(&tables);
        let replaced = Replaced::of(replaced, context.marks.as_ref());
        let KeptLists { file: values, listings: lists, length: lists_length } = match lists.finish(dimensions) {
            Ok(lists) => lists,
            Err(error) => {
                tracing::warn!("{}: no matches are kept: {error}", folder.display());
                return nothing();
            }
        };
        let rounded = rounded.into_iter().map(|meter| meter as usize).collect();
        let tables = (!is_known).then_some(tables);
        let mut index = Index { tables, shards: Vec::new(), replaced, lists, lists_length, rounded };
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
        Keep::Segment(Box::new(Draft { folder: folder.to_owned(), files, values, index, before: before.unwrap_or_default() }))
    }

    /// Writes what is to be kept to files whose names begin with `name`. What cannot be written
    /// is done without.
    pub fn prepare(self, name: &str) -> Prepared {
        match self {
            Keep::AsTheyAre => Prepared::AsTheyAre,
            Keep::Nothing(folder) => Prepared::Nothing(folder),
            Keep::Segment(draft) => {
                let folder = draft.folder.clone();
                match draft.write(name) {
                    Ok(segments) => Prepared::Segments { folder, segments },
                    Err(error) => {
                        tracing::warn!("{}: no matches are kept: {error:#}", folder.display());
                        Prepared::Nothing(folder)
                    }
                }
            }
        }
    }

    /// As [`Keep::prepare`], for a plan that may be published later. Files of earlier plans
    /// that were not are removed.
    pub fn prepare_plan(self, planned_at: Timestamp) -> Prepared {
        if let Keep::Segment(draft) = &self {
            let folder = &draft.folder;
            let manifest = Manifest::read(folder);
            let in_use: Vec<_> = manifest.into_iter().flat_map(|manifest| manifest.segments).collect();
            remove_segments(folder, |name| name.starts_with(OF_PLAN) && !in_use.iter().any(|listed| listed.name == name));
        }
        self.prepare(&format!("{OF_PLAN}{}", planned_at.nanos()))
    }
}

/// How the names of files of a plan begin.
const OF_PLAN: &str = "plan-";

/// What later runs are to find once a run is published.
#[derive(Debug, Default, Serialize, Deserialize)]
pub enum Prepared {
    #[default]
    AsTheyAre,
    Nothing(PathBuf),
    Segments {
        folder: PathBuf,
        segments: Vec<Listed>,
    },
}

impl Prepared {
    /// Lets later runs find what is kept.
    pub fn publish(self, run_id: &str) {
        let (folder, segments) = match self {
            Prepared::AsTheyAre => return,
            Prepared::Nothing(folder) => (folder, None),
            Prepared::Segments { folder, segments } => (folder, Some(segments)),
        };
        let manifest = segments.map(|segments| Manifest { version: VERSION, run_id: run_id.to_owned(), segments });
        let manifest = manifest.filter(|manifest| match manifest.write(&folder) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!("{}: no matches are kept: {error:#}", folder.display());
                false
            }
        });
        if manifest.is_none() {
            let _ = fs::remove_file(folder.join(MANIFEST));
        }
        let segments = manifest.map(|manifest| manifest.segments).unwrap_or_default();
        remove_segments(&folder, |name| !segments.iter().any(|segment| segment.name == name));
    }
}

/// A segment that is written but not published.
#[derive(Debug)]
pub struct Draft {
    folder: PathBuf,
    /// By shard.
    files: Vec<NamedTempFile>,
    values: Option<NamedTempFile>,
    index: Index,
    before: Vec<Listed>,
}

impl Draft {
    /// Returns all segments.
    fn write(self, name: &str) -> Result<Vec<Listed>> {
        let mut segments = self.before;
        // Tables that are not what they were tell which rows there were no more for a while.
        let Index { tables, replaced, lists, rounded, .. } = &self.index;
        let is_empty = replaced.events.is_empty() && lists.is_empty() && rounded.is_empty();
        if !self.files.is_empty() || tables.is_some() || !is_empty {
            for (shard, file) in self.files.into_iter().enumerate() {
                file.persist(matches_path(&self.folder, name, shard))?;
            }
            if let Some(file) = self.values {
                file.persist(values_path(&self.folder, name))?;
            }
            let bytes = zstd::encode_all(serde_json::to_vec(&self.index)?.as_slice(), 1)?;
            fs::write(index_path(&self.folder, name), &bytes)?;
            segments.push(Listed { name: name.to_owned(), checksum: xxh3_64(&bytes) });
        }
        Ok(segments)
    }
}

/// Removes the files of segments by their names.
fn remove_segments(folder: &Path, is_gone: impl Fn(&str) -> bool) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_ours =
            path.extension().is_some_and(|extension| ["matches", "values", "index"].iter().any(|ours| extension == *ours));
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if is_ours && name.split('.').next().is_some_and(&is_gone) {
            let _ = fs::remove_file(&path);
        }
    }
}
